"""Makes the pictures of docs/web_demo.md from a running web demo, in the system's Chromium."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import UserError, flag, parse_flags, run_main

DESKTOP = {"width": 1200, "height": 760}
TALL = {"width": 1200, "height": 860}
PHONE = {"width": 390, "height": 760}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class ScreenshotFlags:
    url: str = flag("http://127.0.0.1:7860", "address of the running web_demo.py")
    out_dir: str = flag("docs/images", "folder for the pictures")


def main() -> int:
    flags = parse_flags(ScreenshotFlags, __doc__)
    program = find_browser()
    if program is None:
        raise UserError(f"no browser: none of {', '.join(BROWSERS)} is installed (apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        things, sailboat = 2, 3  # of the examples
        shoot(browser, flags, "light", things, "What is in the middle?", viewport=DESKTOP)
        shoot(browser, flags, "attention", things, "What is in the middle?", look=True, viewport=TALL)
        chinese = dict(locale="zh-CN", color_scheme="dark")
        shoot(browser, flags, "dark", sailboat, "这是哪一类东西？", **chinese, viewport=DESKTOP)
        shoot(browser, flags, "phone", sailboat, "这是哪一类东西？", locale="zh-CN", viewport=PHONE)
        browser.close()
    return 0


def find_browser() -> str | None:
    """The path of an installed Chromium."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def shoot(
    browser: Browser,
    flags: ScreenshotFlags,
    name: str,
    example: int,
    question: str,
    look: bool = False,
    **options,
) -> None:
    """One picture of a conversation that begins with an example and goes on with `question`."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.goto(flags.url)
    page.locator("#chat .example").nth(example).click()
    answers = page.locator("#chat .bot.message")
    expect(answers).to_have_count(1, timeout=60_000)
    expect(page.locator("#question .submit-button")).to_be_visible()
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")
    expect(answers).to_have_count(2, timeout=60_000)
    expect(page.locator("#question .submit-button")).to_be_visible()
    if look:
        page.click("#look")
        expect(page.locator("#attention img")).to_be_visible(timeout=60_000)
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(1500)  # movements of the page end
    page.screenshot(path=Path(flags.out_dir) / f"web_demo_{name}.png")
    context.close()


if __name__ == "__main__":
    run_main(main)
