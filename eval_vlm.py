"""Asks trained models about pictures, chats about them, or scores them on a file of questions; see --help.

Without pictures or a file the shipped ones in dataset/eval_images/ are described.
"""

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.cli import CONTROLS, UserError, check_seed, flag, parse_flags, run_main, user_errors
from common.distributed import Runtime, autocast, resolve_dtype, runtime
from common.setup import place
from common.weights import write_json
from dataset.pictures import picture_name
from dataset.rows import load_rows
from inference.answers import Question, check_pictures, pictures_of, questions_of
from inference.ask import IN_TEXT, Answer, Speaker, TerminalStreamer, ask
from inference.chat import Sampling
from inference.pictures import PICTURE_SUFFIXES, SHIPPED_PICTURES, pictures_in
from inference.trained import DEFAULT_WEIGHT, ModelFlags, default_weight, load_vlm

log = logging.getLogger(__name__)
PAGES = (".html", ".md")
DEFAULT_PROMPT = "Describe the picture."


@dataclass
class EvalFlags(ModelFlags):
    """ValueError names flags that contradict each other, or a value that makes no sense."""

    weight: list[str] = flag(
        [],
        "a .pth, the name of one in out/, or an exported folder; several are compared; if not given: "
        + DEFAULT_WEIGHT,
        action="extend",
    )
    image: list[str] = flag([], "picture to ask about; several are one question", action="extend")
    image_dir: str | None = flag(
        None, f"folder whose pictures are asked about one by one; if not given: {SHIPPED_PICTURES}"
    )
    prompt: str = flag(DEFAULT_PROMPT, "question about --image or --image_dir")
    chat: bool = flag(False, "talk about pictures in the terminal, beginning with --image; /help tells how")
    data_path: str | None = flag(None, "JSONL, JSON or Parquet whose questions are asked instead")
    images_path: str = flag("", "folder that relative image paths of --data_path start from")
    score: bool = flag(False, "greedy answers to --data_path, compared with the file's own")
    perplexity: bool = flag(False, "how well --data_path's own answers, or texts, are expected")
    blank_images: bool = flag(False, "with --score: show mid-grey pictures instead, as an ablation")
    blank_baseline: bool = flag(
        True, "with --score and --perplexity: do it all again with mid-grey pictures, as a baseline"
    )
    report: str | None = flag(
        None,
        "with --score or --perplexity: JSON file for all figures and answers; otherwise a page of pictures "
        "and answers, .html or .md",
    )
    batch_size: int = flag(32, "questions answered at once with --score, rows with --perplexity")
    temperature: float = flag(0.65, "of sampling; 0 takes the likeliest token. --score is always greedy")
    top_p: float = flag(0.85, "probability mass that sampling draws from")
    max_new_tokens: int = flag(512, "longest answer in tokens; --score stops by the file's own answers")
    stream: bool = flag(False, "print an answer while it is generated")
    seed: int = flag(1337, "seed of sampling")

    def __post_init__(self) -> None:
        self.check_modes()
        if self.batch_size <= 0:
            raise ValueError(f"--batch_size must be above 0, found {self.batch_size}")
        check_seed(self.seed)
        try:
            sampling(self)
        except ValueError as error:
            raise ValueError(f"--{error}") from None
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"--prompt: not text in UTF-8 ({error})") from None

    def check_modes(self) -> None:
        needs = {
            "score": "data_path",
            "perplexity": "data_path",
            "images_path": "data_path",
            "blank_images": "score",
        }
        for name, needed in needs.items():
            if getattr(self, name) and not getattr(self, needed):
                raise ValueError(f"--{name} needs --{needed}")
        exclusive = ("image", "image_dir", "data_path"), ("score", "perplexity", "chat")
        exclusive += tuple(("chat", name) for name in ("image_dir", "data_path", "report"))
        for names in exclusive:
            if len(given := [name for name in names if getattr(self, name)]) > 1:
                raise ValueError(f"--{' and --'.join(given)} exclude each other")
        if self.chat and self.prompt != DEFAULT_PROMPT:
            raise ValueError("--prompt is not for --chat: type it there")
        measures = self.score or self.perplexity
        if measures and self.stream:
            raise ValueError("--stream shows answers; --score and --perplexity do not")
        if self.report and measures == (Path(self.report).suffix.lower() in PAGES):
            expected = "JSON, not a page" if measures else "a .html or .md file, or --score for JSON"
            raise ValueError(f"--report {self.report}: expected {expected}")


def main() -> int:
    flags = parse_flags(EvalFlags, __doc__)
    if sys.stdout:  # None where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    weights = flags.weight or [default_weight()]
    questions = [] if flags.perplexity or flags.chat else list(find_questions(flags))
    check_pictures(dict.fromkeys(flags.image, "--image") | pictures_of(questions))
    if flags.report:
        check_report(Path(flags.report))
    with runtime(flags.device, flags.seed) as run, autocast(flags.dtype, run.device):

        def load(weight: str) -> Speaker:
            model, processor = load_vlm(weight, flags.vision_model_path, flags.tokenizer_path, flags.heads())
            dtype = str(resolve_dtype(flags.dtype, run.device)).removeprefix("torch.")
            log.info("%s on %s in %s", weight, run.device, dtype)
            place(model, run.device, flags.dtype, flags.encoder_dtype)
            return Speaker(weight, model, processor)

        if flags.score:
            score_file(weights, load, questions, flags)
        elif flags.perplexity:
            measure_file(weights, load, flags, run)
        elif flags.chat:
            chat([load(weight) for weight in weights], flags)
        else:
            ask_all([load(weight) for weight in weights], questions, flags)
    return 0


def sampling(flags: EvalFlags) -> Sampling:
    return Sampling(flags.temperature, flags.top_p, flags.max_new_tokens)


def chat(speakers: list[Speaker], flags: EvalFlags) -> None:
    from inference.terminal.chat import TerminalChat

    TerminalChat(speakers, sampling(flags), flags.dtype).run(flags.image)


def ask_all(speakers: list[Speaker], questions: list[Question], flags: EvalFlags) -> None:
    """Prints each question and every model's answer, and writes --report."""
    answers = []
    for question in questions:
        if question.images:
            names = ", ".join(Path(picture_name(path)).name for path in question.images)
            print(f"image:  {names}".translate(CONTROLS))
        print(f"prompt: {question.text}".translate(IN_TEXT))
        answers.append([ask_one(speaker, question, flags, len(speakers) > 1) for speaker in speakers])
        print(flush=True)
    if flags.report:
        from inference.picture_report import write_picture_report

        names = [speaker.name for speaker in speakers]
        write_picture_report(Path(flags.report), questions, answers, names)
        log.info("%s: written", flags.report)


def ask_one(speaker: Speaker, question: Question, flags: EvalFlags, named: bool) -> Answer:
    streamer = TerminalStreamer(speaker.processor) if flags.stream else None
    print(f"{speaker.name if named else 'answer'}: ".translate(CONTROLS), end="", flush=True)
    answer = ask(speaker, question, sampling(flags), streamer)
    if not flags.stream:
        print(answer.text.translate(IN_TEXT), flush=True)
    rate = answer.tokens_per_second
    log.info("%d tokens in %.2f s (%.1f tokens/s)", answer.tokens, answer.seconds, rate)
    return answer


def score_file(
    weights: list[str], load: Callable[[str], Speaker], questions: list[Question], flags: EvalFlags
) -> None:
    """Answers all questions greedily, prints the figures, and writes --report."""
    from inference.scoring.tables import comparison_tables, measure, report_of, score_model, score_table

    scored = []
    for weight in weights:  # one model in memory at a time
        found = score_model(
            load(weight), questions, flags.batch_size, flags.blank_images, flags.blank_baseline
        )
        scored.append(found)
    measured = measure(scored)
    print(f"{flags.data_path}{', blank pictures' if flags.blank_images else ''}".translate(CONTROLS))
    print(score_table(scored[0], measured) if len(scored) == 1 else comparison_tables(scored, measured))
    for one in scored:
        print((one.speed if len(scored) == 1 else f"{one.name}: {one.speed}").translate(CONTROLS))
    if flags.report:
        report = report_of(scored, measured)
        answered = report.pop("questions")
        report |= {"blank_images": flags.blank_images, "weight": weights[0], "data_path": flags.data_path}
        write_json(Path(flags.report), report | {"questions": answered})  # last, because they are long


def measure_file(weights: list[str], load: Callable[[str], Speaker], flags: EvalFlags, run: Runtime) -> None:
    """Prints the perplexity of --data_path, and writes --report."""
    from inference.scoring.perplexity import perplexity, perplexity_table

    data = (flags.data_path, flags.images_path, flags.batch_size, flags.dtype)
    found = {weight: perplexity(load(weight), *data, run, flags.blank_baseline) for weight in weights}
    print(perplexity_table(found))
    if flags.report:
        models = [{"weight": weight, **figures} for weight, figures in found.items()]
        write_json(Path(flags.report), {"data_path": flags.data_path, "models": models})


def find_questions(flags: EvalFlags) -> Iterator[Question]:
    """What the flags ask for. UserError or DataError if a picture or file is missing or has no question."""
    if flags.data_path:
        images_path = Path(flags.images_path) if flags.images_path else None
        questions = questions_of(load_rows([Path(flags.data_path)], images_path), flags.images_path)
        if not questions:
            raise UserError(f"{flags.data_path}: no question, expected user turns with an assistant's answer")
        yield from questions
    elif flags.image:
        yield Question("--image", [{"role": "user", "content": flags.prompt}], flags.image)
    else:
        folder = Path(flags.image_dir or SHIPPED_PICTURES)
        with user_errors(f"--image_dir {folder}"):  # raises for a name that is too long
            if not folder.is_dir():
                raise UserError(f"--image_dir {folder}: no such folder")
        pictures = pictures_in(folder)
        if not pictures:
            raise UserError(f"--image_dir {folder}: no picture, expected {', '.join(PICTURE_SUFFIXES)} files")
        for path in pictures:
            yield Question("--image_dir", [{"role": "user", "content": flags.prompt}], [str(path)])


def check_report(path: Path) -> None:
    """UserError now, rather than after all questions, if the report cannot be written."""
    with user_errors(f"--report {path}"):
        if path.is_dir():
            raise UserError(f"--report {path}: is a folder, expected a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass  # as the report will be written


if __name__ == "__main__":
    run_main(main)
