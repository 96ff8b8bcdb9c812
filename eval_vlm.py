"""Asks a trained model about pictures, or scores it on a file of questions; see --help for every flag.

Without pictures or a file it describes the shipped ones in dataset/eval_images/.
"""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm
from transformers import TextStreamer

from dataset.rows import load_rows
from model.model_vlm import MiniMindVLM
from model.processing_vlm import MiniMindVLMProcessor
from trainer.arguments import DTYPES, flag, optional_flag
from trainer.checkpoint import write_file
from trainer.cli import UserError, parse_flags, run_main, user_errors
from trainer.distributed import autocast, resolve_dtype, runtime
from trainer.evaluation import (
    Question,
    encode_pictures,
    encode_question,
    greedy_answers,
    prepare,
    questions_of,
    score,
    table,
)
from trainer.setup import load_vlm

log = logging.getLogger(__name__)
SHIPPED_PICTURES = "dataset/eval_images"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
PUBLISHED_NAME = Path("out/sft_vlm_512.pth")
DEMO_FOLDER = Path("out/demo")


@dataclass
class EvalFlags:
    """ValueError names flags that contradict each other, or a value that makes no sense."""

    weight: str | None = optional_flag(
        "a .pth, the name of one in out/, or an exported folder; "
        f"if not given: {PUBLISHED_NAME}, else the newest sft_vlm_*.pth in {DEMO_FOLDER}/"
    )
    image: list[str] = field(
        default_factory=list,
        metadata={"help": "picture to ask about; several are one question", "action": "extend"},
    )
    image_dir: str | None = optional_flag(
        f"folder whose pictures are asked about one by one; if not given: {SHIPPED_PICTURES}"
    )
    prompt: str = flag("Describe the picture.", "question about --image or --image_dir")
    data_path: str | None = optional_flag("JSONL or JSON file whose questions are asked instead")
    images_path: str = flag("", "folder that relative image paths of --data_path start from")
    score: bool = flag(False, "greedy answers to --data_path, compared with the file's own")
    blank_images: bool = flag(False, "with --score: show mid-grey pictures instead, as an ablation")
    report: str | None = optional_flag("with --score: JSON file for the figures and every answer")
    batch_size: int = flag(32, "questions answered at once with --score")
    temperature: float = flag(0.65, "of sampling; 0 takes the likeliest token. --score is always greedy")
    top_p: float = flag(0.85, "probability mass that sampling draws from")
    max_new_tokens: int = flag(512, "longest answer in tokens; --score stops by the file's own answers")
    stream: bool = flag(False, "print an answer while it is generated")
    vision_model_path: str | None = optional_flag(
        "folder of the image encoder of a .pth; if not given: what it was trained with"
    )
    tokenizer_path: str | None = optional_flag("folder of its tokenizer; if not given: likewise")
    device: str | None = optional_flag("cuda, cuda:1, mps or cpu; if not given: the best there is")
    dtype: str = flag(
        "auto", "precision of the forward pass; auto is bfloat16 where the hardware has it", DTYPES
    )
    seed: int = flag(1337, "seed of sampling")

    def __post_init__(self) -> None:
        sources = [name for name in ("image", "image_dir", "data_path") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(f"--{' and --'.join(sources)} exclude each other")
        needs = {"score": "data_path", "images_path": "data_path", "blank_images": "score", "report": "score"}
        for name, needed in needs.items():
            if getattr(self, name) and not getattr(self, needed):
                raise ValueError(f"--{name} needs --{needed}")
        if self.score and self.stream:
            raise ValueError("--stream is for a chat, not for --score")
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be above 0, found {getattr(self, name)}")
        for name in ("temperature", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, found {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be above 0 and at most 1, found {self.top_p}")


def main() -> int:
    flags = parse_flags(EvalFlags, __doc__)
    weight = flags.weight or default_weight()
    questions = list(find_questions(flags))
    if flags.report:
        check_report(Path(flags.report))
    with runtime(flags.device, flags.seed) as run:
        model, processor = load_vlm(weight, flags.vision_model_path, flags.tokenizer_path)
        model.to(run.device)
        dtype = resolve_dtype(flags.dtype, run.device)
        log.info("%s on %s in %s", weight, run.device, str(dtype).removeprefix("torch."))
        with autocast(flags.dtype, run.device):
            if flags.score:
                score_file(model, processor, questions, weight, flags)
            else:
                chat(model, processor, questions, flags)
    return 0


def chat(
    model: MiniMindVLM, processor: MiniMindVLMProcessor, questions: list[Question], flags: EvalFlags
) -> None:
    """Prints each question and the model's answer, sampled unless the temperature is 0."""
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": False}
    if flags.temperature > 0:
        # The library would keep only the 50 likeliest tokens as well, which the release does not.
        sampling = {"do_sample": True, "temperature": flags.temperature, "top_p": flags.top_p, "top_k": 0}
    for question in questions:
        features = encode_pictures(model, processor, [question])
        inputs = prepare(processor, [encode_question(processor, question)], [question.images], features)
        if question.images:
            print(f"image:  {', '.join(Path(path).name for path in question.images)}")
        print(f"prompt: {question.text}")
        print("answer: ", end="", flush=True)
        start = time.perf_counter()
        with user_errors(question.where):
            output = model.generate(
                **inputs.to(model.device),
                **sampling,
                max_new_tokens=flags.max_new_tokens,
                streamer=streamer if flags.stream else None,
            )  # (1, T + new)
        seconds = time.perf_counter() - start
        new = output[0, inputs["input_ids"].shape[1] :]  # (new,)
        if not flags.stream:
            print(processor.tokenizer.decode(new, skip_special_tokens=True))
        print(flush=True)
        log.info("%d tokens in %.2f s (%.1f tokens/s)", len(new), seconds, len(new) / seconds)


def score_file(
    model: MiniMindVLM,
    processor: MiniMindVLMProcessor,
    questions: list[Question],
    weight: str,
    flags: EvalFlags,
) -> None:
    """Answers all questions greedily, prints accuracies, and writes --report."""
    answers = [""] * len(questions)
    answered = greedy_answers(model, processor, questions, flags.batch_size, flags.blank_images)
    start = time.perf_counter()
    with tqdm(total=len(questions), unit=" questions", smoothing=0) as bar:
        for index, answer in answered:
            answers[index] = answer
            bar.update()
    seconds = time.perf_counter() - start
    report = score(questions, answers)
    pictures = ", blank pictures" if flags.blank_images else ""
    print(f"{flags.data_path}{pictures}")
    print(table(report))
    ids = processor.tokenizer(answers, add_special_tokens=False)["input_ids"]
    tokens = len(answers) + sum(map(len, ids))  # each with its end
    print(
        f"{len(questions)} questions in {seconds:.1f} s "
        f"({len(questions) / seconds:.1f} questions/s, {tokens / seconds:.1f} tokens/s)"
    )
    if flags.report:
        answered = report.pop("questions")
        report |= {"blank_images": flags.blank_images, "weight": weight, "data_path": flags.data_path}
        report["questions"] = answered  # last, because they are long
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        write_file(Path(flags.report), lambda file: file.write(text.encode()))


def find_questions(flags: EvalFlags) -> Iterator[Question]:
    """What the flags ask for. UserError or DataError if a picture or file is missing or has no question."""
    if flags.data_path:
        images_path = Path(flags.images_path) if flags.images_path else None
        questions = questions_of(load_rows([Path(flags.data_path)], images_path), flags.images_path)
        if not questions:
            raise UserError(f"{flags.data_path}: no question, expected user turns with an assistant's answer")
        yield from questions
    elif flags.image:
        for path in flags.image:
            if not Path(path).is_file():
                raise UserError(f"--image {path}: no such file")
        yield Question("--image", [{"role": "user", "content": flags.prompt}], flags.image)
    else:
        folder = Path(flags.image_dir or SHIPPED_PICTURES)
        if not folder.is_dir():
            raise UserError(f"--image_dir {folder}: no such folder")
        pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
        if not pictures:
            raise UserError(f"--image_dir {folder}: no picture, expected {', '.join(PICTURES)} files")
        for path in pictures:
            yield Question("--image_dir", [{"role": "user", "content": flags.prompt}], [str(path)])


def default_weight() -> str:
    demo = sorted(DEMO_FOLDER.glob("sft_vlm_*.pth"), key=lambda path: path.stat().st_mtime, reverse=True)
    found = next((path for path in (PUBLISHED_NAME, *demo) if path.is_file()), None)
    if found is None:
        raise UserError(
            f"no weights: neither {PUBLISHED_NAME} nor {DEMO_FOLDER}/sft_vlm_*.pth is there: train the demo "
            "(bash scripts/quickstart.sh), get the published ones (python scripts/download.py clip vlm), "
            "or give --weight"
        )
    return str(found)


def check_report(path: Path) -> None:
    """UserError now, rather than after all questions, if the report cannot be written."""
    with user_errors(f"--report {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError(f"--report {path}: is a folder, expected a file")


if __name__ == "__main__":
    run_main(main)
