"""Serves a page to chat with a trained model about pictures, on this machine; see --help for every flag.

The page follows the browser's language (English, Chinese) and colours (light, dark). Nothing it needs comes
from elsewhere, and it tells nobody. docs/web_demo.md says what it is for and how it is limited.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.tunneling import CURRENT_TUNNELS
from PIL import Image
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from common.cli import flag, parse_flags, run_main, user_errors
from common.distributed import resolve_dtype, runtime
from inference.pictures import SHIPPED_PICTURES
from inference.trained import ModelFlags, default_weight, find_weight
from inference.web.events import OUT_DIR, Demo
from inference.web.page import CSS, FONTS, I18N, JS, build_page

log = logging.getLogger(__name__)
SESSIONS = 100  # conversations kept; the one used longest ago is forgotten
UPLOAD_SIZE = "10mb"
MAX_PIXELS = 32_000_000  # Pillow refuses pictures of twice as many


@dataclass
class DemoFlags(ModelFlags):
    """ValueError names a flag whose value makes no sense."""

    weight: str | None = flag(
        None,
        "the model to begin with: a .pth, the name of one in out/, or an exported folder; if not given: what "
        "eval_vlm.py takes",
    )
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = flag(7860, "port to listen on")
    share: bool = flag(False, "also offer a public address, by a tunnel through Gradio's servers")
    max_queue: int = flag(32, "questions that may wait; further ones are refused")

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ValueError(f"--port must lie between 1 and 65535, found {self.port}")
        if self.max_queue <= 0:
            raise ValueError(f"--max_queue must be above 0, found {self.max_queue}")


def main() -> int:
    flags = parse_flags(DemoFlags, __doc__)
    weight = str(find_weight(flags.weight or default_weight()))
    check_port(flags.host, flags.port)
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    with runtime(flags.device, seed=int(time.time())) as run, own_temporary_folder():
        model_flags = flags.vision_model_path, flags.tokenizer_path, flags.heads()
        demo = Demo(weight, run.device, (flags.dtype, flags.encoder_dtype), *model_flags)
        demo.model(weight)  # what is wrong with it is told here rather than in the page
        page = build_page(demo)
        page.queue(max_size=flags.max_queue)
        with user_errors(f"--host {flags.host} --port {flags.port}"):
            page.launch(
                server_name=flags.host,
                server_port=flags.port,
                share=flags.share,
                max_file_size=UPLOAD_SIZE,
                state_session_capacity=SESSIONS,
                i18n=I18N,
                css=CSS,
                js=JS,
                theme=gr.themes.Default(primary_hue="blue", font=FONTS),
                footer_links=["settings"],
                run_history=False,
                ssr_mode=False,
                blocked_paths=private_paths(weight),
                app_kwargs={"middleware": [Middleware(NoRelay)]},
                prevent_thread_lock=True,
                quiet=True,
            )
        dtype = str(resolve_dtype(flags.dtype, run.device)).removeprefix("torch.")
        log.info("%s on %s in %s: open %s (Ctrl-C ends it)", weight, run.device, dtype, page.local_url)
        if page.share_url:
            log.info("open to everybody who knows it: %s", page.share_url)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # uploads are deleted then, too
        try:
            threading.Event().wait()
        finally:
            for tunnel in CURRENT_TUNNELS:
                tunnel.kill()
    return 0


@contextlib.contextmanager
def own_temporary_folder() -> Iterator[None]:
    """What is uploaded, and the pictures made of it, is deleted when this is left. Gradio alone would keep
    what it makes for components that an event has changed."""
    parent = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="minimind-v-", dir=parent, ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield


def private_paths(weight: str) -> list[str]:
    """What is not served even if an event returned it; uploads may lie in none of it."""
    private = OUT_DIR, Path(".git"), Path(weight), *Path(SHIPPED_PICTURES).parent.glob("*.*")
    uploads = Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
    return [str(path.absolute()) for path in private if not uploads.is_relative_to(path.resolve())]


class NoRelay:
    """Refuses to fetch for a visitor: Gradio passes on what any public address gives."""

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        relayed = scope["type"] == "http" and re.search(r"/(file|proxy)=\s*\w+:", scope["path"])
        await (PlainTextResponse("not from here", 403) if relayed else self.app)(scope, receive, send)


def check_port(host: str, port: int) -> None:
    """UserError if nothing can listen there."""
    with user_errors(f"--host {host} --port {port}"), socket.create_server((host, port)):
        pass


if __name__ == "__main__":
    try:
        run_main(main)
    except SystemExit as end:  # now: the interpreter would wait for the threads of every page that is open
        os._exit(end.code)
