"""scripts/report.py: what stands in the page of a run, and what it says about what is missing."""

import html
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, TINY_ENCODER, write_rows

from common.setup import build_vlm
from common.weights import describe, half_state, save_weights
from inference.answers import Question
from inference.scoring.accuracy import score

sys.path.insert(0, str(ROOT / "scripts"))
import report

SCRIPT = "scripts/report.py"
ALARM = "<script>alert(1)</script>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of eight steps that has a summary, and no weights."""
    folder = tmp_path / "runs/sft_vlm_64"
    folder.mkdir(parents=True)
    rows = [
        {"step": step, "epoch": 0, "loss": 4 / step, "learning_rate": 1e-3, "samples_per_second": 10.0 + step}
        for step in range(1, 9)
    ]
    write_rows(folder / "metrics.jsonl", [*rows, {"step": 8, "epoch": 0, "eval_loss": 0.625}])
    arguments = {
        "data_path": ["a.jsonl", "b.jsonl"],
        "wandb_project": ALARM,
        "hidden_size": 64,
        "max_steps": None,
    }
    figures = {"step": 8, "loss": 0.5, "eval_loss": 0.625, "seconds": 125.0, "tokens": 250_000, "rows": 4321}
    summary = {**figures, "samples_per_second": 34.568, "peak_memory_bytes": 1_234_000_000}
    write_json(
        folder / "summary.json", summary | {"stage": "sft_vlm", "exit_code": 0, "arguments": arguments}
    )
    return folder


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_score(path: Path, weight: str, data_path: str, right: int, blank: bool = False) -> None:
    """Of four questions that `right` were answered rightly; "yes" is the answer to two."""
    expected = ["yes", "yes", "no", "maybe"]
    asked = [Question("row", [{"role": "user", "content": "?"}], [], "kind <b>", text) for text in expected]
    answers = [text if number < right else "wrong" for number, text in enumerate(expected)]
    details = {"blank_images": blank, "weight": weight, "data_path": data_path}
    write_json(path, score(asked, answers) | details)


def page_of(folder: Path) -> str:
    return report.render(report.open_run(folder))


def texts(page: str, pattern: str) -> list[str]:
    """The text of everything that a pattern with one group finds, without tags."""
    found = re.findall(pattern, page, re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]+>", " ", part)).strip() for part in found]


def pairs(page: str) -> dict[str, str]:
    return dict(re.findall(r"<tr><th>([^<]*)</th><td>([^<]*)</td></tr>", page))


def test_a_real_run_has_everything_in_one_file(data, run, tmp_path, tokenizer):
    model, _ = build_vlm(SIZES, str(TINY_ENCODER), tokenizer)
    base = save(tmp_path / "base/pretrain_vlm_64.pth", model, tokenizer)
    flags = [*TINY, "--out_dir", tmp_path / "out", "--batch_size", 4, "--epochs", 1, "--from_weight", base]
    flags += ["--learning_rate", "1e-2", "--images_path", data / "images"]
    evaluation = ["--eval_data_path", data / "captions.jsonl", "--eval_interval", 1]
    evaluation += ["--sample_data_path", data / "captions.jsonl", "--sample_rows", 4]
    run("train_sft_vlm.py", *flags, "--data_path", data / "dialogues.jsonl", *evaluation)
    folder = tmp_path / "out/runs/sft_vlm_64"
    result = run(SCRIPT, folder)

    page = (folder / "report.html").read_text(encoding="utf-8")
    assert result.stdout.startswith(f"{folder / 'report.html'}: sft_vlm_64, ")
    summary = json.loads((folder / "summary.json").read_text())
    assert texts(page, r"<b>(.*?)</b>")[:3] == [
        str(summary["step"]),
        f"{summary['loss']:.4g}",
        f"{summary['eval_loss']:.4g}",
    ]
    assert page.count("<svg") == 3
    assert len(texts(page, r'<dd class="before">(.*?)</dd>')) == 12
    assert len(texts(page, r'<dd class="after">(.*?)</dd>')) == 12
    assert page.count('<img src="data:image/') == page.count("<img") == 12 + 4
    assert len(cells(page)) == 4 * summary["step"]
    assert pairs(page)["hidden_size"] == "64"
    assert pairs(page)["transformers"] == summary_versions(folder)["transformers"]
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)  # nothing is fetched from elsewhere
    assert not re.search(r"<script|<link|@import|url\(http", page)


def summary_versions(folder: Path) -> dict[str, str]:
    return json.loads(folder.parent.parent.joinpath("sft_vlm_64.json").read_text())["versions"]


def test_figures_are_those_of_the_summary(folder):
    page = page_of(folder)

    assert texts(page, r"<b>(.*?)</b>") == ["8", "0.5", "0.625", "2 min 5 s"]
    shown = pairs(page)
    assert shown["samples per second"] == "34.57" and shown["tokens per second"] == "2,000"
    assert shown["rows"] == "4,321" and shown["peak memory"] == "1.23 GB"
    assert shown["data_path"] == "a.jsonl, b.jsonl" and shown["max_steps"] == "not set"
    assert "Training report · finished" in page


def test_text_that_looks_like_html_stays_text(folder):
    page = page_of(folder)

    assert ALARM not in page and html.escape(ALARM) in page


def test_curves_take_the_colours_of_the_page(folder):
    page = page_of(folder)

    assert page.count("<svg") == 3 and page.count("currentColor") > 10
    assert report.INK not in page
    assert "sft_vlm_64, eval" in page  # the legend is text, not outlines


def write_samples(folder: Path, steps: list[int], answers=lambda step: f"at {step}", **values) -> None:
    """A question about one picture, and one about none, that are answered at each of `steps`."""
    asked = {"where": "a:1", "question": ALARM, "images": [], "expected": "at 40", **values}
    other = {"where": "a:2", "question": "Hi", "images": [], "expected": "Hello.", "answer": ""}
    lines = [{"step": step, "answers": [asked | {"answer": answers(step)}, other]} for step in steps]
    write_rows(folder / "samples.jsonl", lines)


def cells(page: str) -> list[tuple[str, str]]:
    """Step and answer of each cell of the time line; right ones end in a star."""
    found = re.findall(r'<td data-step="(.*?)"( class="right")?>(.*?)</td>', page)
    return [(step, html.unescape(answer) + ("*" if right else "")) for step, right, answer in found]


@pytest.mark.parametrize(
    ("steps", "shown"),
    [
        ([40], ["40"]),
        ([10, 20, 40], ["10", "20", "40"]),
        ([*range(10, 1001, 10)], ["10", "150", "290", "430", "580", "720", "860", "1,000"]),
    ],
    ids=["one", "few", "many"],
)
def test_time_line_has_few_steps_with_the_first_and_the_last(folder, steps, shown):
    write_samples(folder, steps)
    page = page_of(folder)

    assert texts(page, r'<table class="card timeline">\s*<thead>(.*?)</thead>')[0].split() == ["step", *shown]
    found = cells(page)
    told = [f"at {step.replace(',', '')}" for step in shown]
    assert found[: len(shown)] == [
        (step, answer + "*" * (answer == "at 40")) for step, answer in zip(shown, told, strict=True)
    ]
    assert found[len(shown) :] == [(step, "(nothing)") for step in shown]
    assert ALARM not in page and html.escape(ALARM) in page


def test_time_line_shows_the_pictures_that_are_there(folder, data):
    images = [str(data / "images/0.png"), str(data / "gone.png")]
    write_samples(folder, [1, 2], images=images)
    page = page_of(folder)

    (table,) = re.findall(r'<table class="card timeline">.*?</table>', page, re.DOTALL)
    assert re.findall(r'<img src="data:image/jpeg;base64,[^"]+" alt="(.*?)">', table) == ["0.png"]
    assert "gone.png is not there any more." in table


def test_an_answer_may_have_a_line_separator(folder):
    write_samples(folder, [5], lambda step: "one\u2028two")
    line = (folder / "samples.jsonl").read_text(encoding="utf-8")

    assert line.count("\n") == 1 and "\u2028" in line
    assert cells(page_of(folder))[0] == ("5", "one\u2028two")


def test_questions_that_came_later_have_no_earlier_answer(folder):
    write_samples(folder, [5])
    first = (folder / "samples.jsonl").read_text()
    write_samples(folder, [6], question="New?")
    (folder / "samples.jsonl").write_text(first + (folder / "samples.jsonl").read_text())

    assert cells(page_of(folder))[:2] == [("5", "–"), ("6", "at 6")]


def test_answers_are_those_of_the_weights(folder, tokenizer):
    out = folder.parents[1]
    parrot(out / "pretrain_vlm_64.pth", tokenizer, "before the stage")
    parrot(out / "sft_vlm_64.pth", tokenizer, f"after {ALARM}")
    page = page_of(folder)
    (out / "pretrain_vlm_64.pth").unlink()
    without_base = page_of(folder)

    assert texts(page, r'<dd class="before">(.*?)</dd>') == ["before the stage"] * 12
    assert re.findall(r'<dd class="after">(.*?)</dd>', page) == [html.escape(f"after {ALARM}")] * 12
    assert "only the answers after it" not in page
    assert 'class="before"' not in without_base and without_base.count('<dd class="after">') == 12
    assert "only the answers after it" in without_base


def test_fresh_weights_are_not_missed(folder, tokenizer):
    parrot(folder.parents[1] / "sft_vlm_64.pth", tokenizer, "after")
    summary = json.loads((folder / "summary.json").read_text())
    summary["arguments"]["from_weight"] = "none"
    write_json(folder / "summary.json", summary)
    page = page_of(folder)

    assert "It started from fresh weights, so only the answers after it." in page
    assert "are not there" not in page and 'class="before"' not in page


SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def save(path: Path, model, tokenizer) -> Path:
    sidecar = describe(model, tokenizer, path.stem[:-3], 1, {"vision_model_path": str(TINY_ENCODER)})
    path.parent.mkdir(exist_ok=True)
    save_weights(path, half_state(model.state_dict()), sidecar)
    return path


def parrot(path: Path, tokenizer, answer: str) -> None:
    """Weights that are blind, and say `answer` to the question."""
    torch.manual_seed(0)
    model, processor = build_vlm(SIZES, str(TINY_ENCODER), tokenizer)
    said = [{"role": "user", "content": report.QUESTION}, {"role": "assistant", "content": answer}]
    ids, labels = (torch.tensor([row]) for row in processor.encode_chat(said, 1))
    for parameter in model.vision_proj.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(ids, image_features=torch.zeros(1, 1, 196, 64), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1, "the fixture did not learn its answer"
    save(path, model, tokenizer)


def test_scores_of_these_weights_stand_beside_the_baseline(folder):
    out = folder.parents[1]
    write_score(out / "report_seen.json", "out/sft_vlm_64.pth", "data/easy.jsonl", 3)
    write_score(out / "report_unseen.json", "out/sft_vlm_64.pth", "data/hard.jsonl", 1)
    write_score(out / "report_dark.json", "out/sft_vlm_64.pth", "data/hard.jsonl", 0, blank=True)
    write_score(out / "report_other.json", "out/sft_vlm_32.pth", "data/hard.jsonl", 4)
    (out / "report_cut.json").write_text('{"weight": ')
    write_json(out / "report_bare.json", {"weight": "sft_vlm_64.pth", "by_kind": 3})
    page = page_of(folder)

    assert texts(page, r"<thead>(.*?)</thead>")[0].split("  ") == [
        "kind of question",
        "dark (blank pictures)",
        "seen",
        "unseen",
        "most frequent answer (hard)",
        "most frequent answer (easy)",
    ]
    (first, *_) = re.findall(r"<tbody>\s*(<tr.*?</tr>)", page, re.DOTALL)
    assert re.findall(r"<t[hd]>(.*?)</t[hd]>", first) == [
        "kind &lt;b&gt;", "0.000", "0.750", "0.250", "0.500", "0.500"
    ]  # fmt: skip
    missing = texts(page, r'<p class="missing">(.*?)</p>')
    assert "report_bare.json is no report of eval_vlm.py, or a damaged one." in missing
    assert "report_cut.json is no report of eval_vlm.py, or a damaged one." in missing


def test_what_is_missing_is_said(folder):
    (folder / "summary.json").unlink()
    page = page_of(folder)

    assert "not ended: no summary.json; step 8 was the last one written down" in page
    assert texts(page, r"<b>(.*?)</b>") == ["8", "0.5", "0.625", "none"]
    assert pairs(page)["samples per second, newest line"] == "18"
    assert texts(page, r'<p class="missing">(.*?)</p>') == [
        "Nothing was asked:  --sample_data_path  names the file to ask from.",
        "It is not known what stage this is.",
        "No report_*.json beside the weights is about them. eval_vlm.py --score --report writes one.".replace(
            "eval_vlm.py --score --report", " eval_vlm.py --score --report "
        ),
        "Neither summary.json nor a sidecar beside the weights is there.",
        "The sidecar that says so is not there.",
    ]


def test_weights_that_do_not_load_are_said(folder, tokenizer):
    path = folder.parents[1] / "sft_vlm_64.pth"
    assert "sft_vlm_64.pth is not there." in page_of(folder)
    path.write_bytes(b"no weights")
    assert "sft_vlm_64.json is not there." in page_of(folder)
    model, _ = build_vlm({"hidden_size": 64, "num_hidden_layers": 1}, str(TINY_ENCODER), tokenizer)
    write_json(
        path.with_suffix(".json"),
        describe(model, tokenizer, "sft_vlm", 1, {"vision_model_path": str(TINY_ENCODER)}),
    )

    assert f"The weights cannot be asked: {path}: not readable weights" in page_of(folder)


def test_a_language_model_is_not_asked_about_pictures(folder):
    summary = json.loads((folder / "summary.json").read_text())
    write_json(folder / "summary.json", summary | {"stage": "lm", "exit_code": 143})
    page = page_of(folder)

    assert "This stage reads no pictures." in page
    assert "stopped early (exit code 143)" in page


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        pytest.param(lambda run: run.rename(run.with_name("gone")), "{run}: no such folder", id="no folder"),
        pytest.param(
            lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl: no such file", id="no run"
        ),
        pytest.param(
            lambda run: (run / "summary.json").write_text("{"),
            "{run}/summary.json: not JSON",
            id="cut summary",
        ),
        pytest.param(
            lambda run: (run / "summary.json").write_text("[]"),
            "expected a JSON object, found list",
            id="list",
        ),
        pytest.param(
            lambda run: (run / "samples.jsonl").write_text('{"step": 1, "answers": [3]}\n'),
            "{run}/samples.jsonl: expected answers as the training writes them",
            id="other samples",
        ),
        pytest.param(
            lambda run: (run / "samples.jsonl").write_text('{"step": 1, "answ'),
            "{run}/samples.jsonl:1: not JSON",
            id="cut samples",
        ),
        pytest.param(
            lambda run: (run / "report.html").mkdir(), "cannot write {run}/report.html", id="no place"
        ),
    ],
)
def test_what_is_no_run_is_one_clear_line(folder, run, prepare, message):
    prepare(folder)
    result = run(SCRIPT, folder, expect=1)

    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message.format(run=folder) in line
    assert not (folder / "report.html").is_file()


def test_no_run_is_a_usage_error(run):
    assert "RUN" in run(SCRIPT, expect=2).stderr
