"""Checks a whole data set before it is trained on, in any layout that training reads and by the same code.

Prints a report and writes it to --out_dir: report.json, bad_rows.jsonl (all of them) and index.html, with
samples as the model will see them. Exit code 1 if any row is bad.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import CONTROLS, flag, parse_flags, run_main, user_errors, write_stdout
from common.setup import ENCODERS, TOKENIZERS, build_vlm, settings_of_base
from common.tokenizer import load_tokenizer
from common.weights import release_of, write_file, write_json
from dataset.sources import find_files
from model.processing_vlm import MiniMindVLMProcessor
from scripts.checks.clean import CleanCopy
from scripts.checks.figures import Figures, Overlap, lines_of
from scripts.checks.pages import page
from scripts.checks.reading import Facts, Reading
from trainer.arguments import ROW_FILES

SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}


@dataclass
class CheckFlags:
    data_path: list[str] = flag([], f"the rows to check: {ROW_FILES}")
    images_path: str = flag("", "folder that the rows' relative image paths start from")
    eval_data_path: list[str] = flag(
        [], "rows to be measured with: checked too, and compared with the others"
    )
    max_seq_len: int = flag(640, "longest row in tokens, images included; training cuts longer ones")
    from_weight: str | None = flag(
        None, "weights whose tokenizer and encoder are taken, as training takes them"
    )
    tokenizer_path: str | None = flag(None, f"folder of the tokenizer; if not given: {TOKENIZERS[2]}")
    vision_model_path: str | None = flag(
        None, f"folder of the image encoder; none: for rows of text alone; if not given: {ENCODERS[2]}"
    )
    pixel_shuffle: int | None = flag(None, "side of the patches that become a token; if not given: 1")
    decode: bool = flag(True, "open every picture, not only look whether it is there")
    num_workers: int = flag(min(8, os.cpu_count() or 1), "processes that check rows; 0: this one")
    out_dir: str = flag("out/check_data", "folder for the report")
    fix: str | None = flag(
        None, "folder for a copy of the files without rows that are bad or like one before"
    )

    def __post_init__(self) -> None:
        if not self.data_path:
            raise ValueError("--data_path is needed: the rows to check")
        for name, least in {"max_seq_len": 1, "num_workers": 0, "pixel_shuffle": 1}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, found {value}")


def main() -> int:
    flags, start = parse_flags(CheckFlags, __doc__), time.perf_counter()
    processor = open_processor(flags)
    out = Path(flags.out_dir)
    copy = CleanCopy(flags.data_path, Path(flags.fix), flags.images_path) if flags.fix else None
    report: dict[str, Any] = {"max_seq_len": flags.max_seq_len, "decoded": flags.decode}
    with user_errors("--out_dir"):
        out.mkdir(parents=True, exist_ok=True)
        listing = (out / "bad_rows.jsonl").open("wb", buffering=0)
    with listing, tempfile.TemporaryDirectory() as scratch:
        reading, figures = read(flags, flags.data_path, processor, scratch), Figures()
        for facts in reading.verdicts(flags.num_workers, "checking rows"):
            figures.add(facts)
            if copy:
                copy.add(facts)
            list_bad(listing, facts, reading)
        list_broken(listing, reading)
        report.update(
            files=[str(file) for file in reading.files], broken_files=[error for _, error in reading.broken]
        )
        report.update(figures.report())
        report["seconds"] = round(time.perf_counter() - start, 2)
        if flags.eval_data_path:
            report["overlap"] = compare(flags, figures, processor, listing, scratch)
        html = page(report, reading.checker, reading.sampled).encode(errors="backslashreplace")
    write_json(out / "report.json", report)
    write_file(out / "index.html", lambda file: file.write(html))
    for line in lines_of(report):
        write_stdout(line.translate(CONTROLS) + "\n")
    write_stdout(f"all of it: {out / 'index.html'}, {out / 'report.json'}, {out / 'bad_rows.jsonl'}\n")
    for line in copy.write() if copy else ():
        write_stdout(line.translate(CONTROLS) + "\n")
    return int(is_bad(report))


def open_processor(flags: CheckFlags) -> MiniMindVLMProcessor:
    """As training builds it from the same flags; without an image processor where there is no encoder."""
    config, found = {}, {}
    if flags.from_weight:
        config, found = settings_of_base(Path(flags.from_weight), {}, flags.vision_model_path)
    release = release_of(config)
    tokenizer_path = flags.tokenizer_path or found.get("tokenizer_path") or TOKENIZERS[release]
    encoder = flags.vision_model_path or found.get("vision_model_path") or ENCODERS[release]
    tokenizer = load_tokenizer(tokenizer_path)
    if encoder == "none":
        return MiniMindVLMProcessor(None, tokenizer)
    taken = {
        name: config[name] for name in ("image_ids", "image_special_token", "pixel_shuffle") if name in config
    }
    shuffled = {"pixel_shuffle": flags.pixel_shuffle} if flags.pixel_shuffle else {}
    return build_vlm(SMALL | taken | shuffled, encoder, tokenizer)[1]


def read(flags: CheckFlags, paths: list[str], processor: MiniMindVLMProcessor, scratch: str) -> Reading:
    files = [file for path in paths for file in find_files(Path(path))]
    images = Path(flags.images_path) if flags.images_path else None
    return Reading(files, processor, flags.max_seq_len, images, flags.decode, Path(scratch))


def compare(
    flags: CheckFlags, learnt: Figures, processor: MiniMindVLMProcessor, listing: BinaryIO, scratch: str
) -> dict[str, Any]:
    """Checks --eval_data_path, and says what its rows share with those that are `learnt`."""
    reading, overlap, bad = read(flags, flags.eval_data_path, processor, scratch), Overlap(learnt), 0
    shared = []
    for facts in reading.verdicts(flags.num_workers, "checking evaluation rows"):
        bad += bool(facts.error)
        list_bad(listing, facts, reading)
        if what := overlap.of(facts):
            shared.append({"where": facts.where, "shares": what})
    list_broken(listing, reading)
    return {
        **overlap.counts,
        "bad_rows": bad,
        "broken_files": [error for _, error in reading.broken],
        "shared": shared,
    }


def list_bad(listing: BinaryIO, facts: Facts, reading: Reading) -> None:
    if facts.error:
        _list(listing, reading.files[facts.file], facts.where, facts.error, facts.is_structural)


def list_broken(listing: BinaryIO, reading: Reading) -> None:
    for file, error in reading.broken:
        _list(listing, file, None, error, True)


def _list(listing: BinaryIO, file: Path, where: str | None, error: str, is_structural: bool) -> None:
    """A line of bad_rows.jsonl. `where` is None for the rest of a file, or all of it."""
    line = {"file": str(file), "where": where, "error": error, "structural": is_structural}
    with user_errors("--out_dir: cannot write bad_rows.jsonl"):
        listing.write(json.dumps(line).encode() + b"\n")


def is_bad(report: dict[str, Any]) -> bool:
    overlap = report.get("overlap", {})
    bad = sum(report["bad_rows"].values()) + overlap.get("bad_rows", 0)
    return bool(bad or report["broken_files"] or overlap.get("broken_files"))


if __name__ == "__main__":
    run_main(main)
