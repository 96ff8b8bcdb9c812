"""How fast training and inference are on this machine, beside the published release's way of doing the same.

    python scripts/bench/benchmark.py --json out/benchmark.json --plot out/benchmark.png
Both get the same rows, order and initial weights, in processes of their own that take turns. `published` pads
every row to the stage's longest, keeps the logits of all positions, computes attention step by step, loops
over experts, asks one question at a time, and works in float32; `default` is what the training scripts do;
`cached` adds --cache_features.
"""

import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import CLIPVisionConfig, SiglipVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark_scaling import json_line, scale, scaling_table
from flops import step_flops
from plot_benchmark import plot
from published import PublishedVLM, working_as_published

from common.distributed import autocast, peak_memory_bytes, resolve_dtype, runtime
from common.setup import TOKENIZERS, place, special_ids
from common.tokenizer import load_tokenizer
from dataset.feature_cache import FeatureCache, encode_missing
from dataset.vlm_dataset import VLMDataset
from inference.answers import encode_pictures, encode_question, prepare, questions_of
from model.model_vlm import MiniMindVLM, VLMConfig
from model.processing_vlm import MiniMindVLMProcessor
from trainer.arguments import VLMTrainingFlags
from trainer.batches import planned_steps, step_sampler
from trainer.loop import train
from trainer.stage import set_trainable

ROOT = Path(__file__).resolve().parents[2]
# Longest row, mean row in tokens: so that 58 % and 65 % of a batch of the published scripts is padding.
LENGTHS = {"pretrain": (640, 269), "sft": (1536, 538), "moe": (640, 269), "inference": (640, 269)}
LENGTHS["release3"] = (768, 330)  # fine-tuning 768 x 8, 64 tokens a picture
SPREAD = 0.5  # standard deviation of the logarithm of a row's text length
BATCH_SIZES = {
    "pretrain": 8,
    "sft": 4,
    "moe": 4,
    "release3": 4,
    "inference": 4,
}  # what fits 24 GiB in all modes at once
# Of the releases' code.
TRAINABLE = {"pretrain": "proj", "sft": "proj_llm", "moe": "proj", "release3": "proj_first_last"}
RELEASE_3 = {"num_key_value_heads": 4, "qk_norm": True, "projector": "mlp"}
STAGES = ("pretrain", "sft", "moe", "release3", "inference")
MODES = ("published", "default", "cached")  # inference has no use for a cache
MEASURED = ("samples_per_second", "tokens_per_second", "padding", "utilization", "ratio")
COUNTS = ("rows", "tokens", "supervised_tokens")
ANSWER_TOKENS = 32
PICTURES = 1000  # distinct ones, at most


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES, help="what is compared")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each figure, in turns")
    parser.add_argument("--rows", type=int, default=256, help="rows whose lengths are drawn")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a repeat")
    parser.add_argument("--batch_size", type=int, help=f"rows of a step; if not given: {BATCH_SIZES}")
    parser.add_argument("--hidden_size", type=int, default=512, help="width of the language model")
    parser.add_argument("--num_hidden_layers", type=int, default=8, help="its layers")
    parser.add_argument("--vision_layers", type=int, default=12, help="layers of the encoder, else ViT-B/16")
    sides = {"choices": (1, 2, 7, 14), "default": 1}
    parser.add_argument("--pixel_shuffle", type=int, **sides, help="2: 49 tokens a picture, not 196")
    parser.add_argument("--dtype", default="auto", help="of default and cached; published is float32")
    parser.add_argument("--device", help="cuda or cpu; if not given: the best there is")
    parser.add_argument("--compile", action="store_true", help="default and cached run compiled")
    parser.add_argument("--scaling", action="store_true", help="also time and memory against sizes")
    rows = [1000, 100_000, 1_000_000]
    parser.add_argument("--scaling_rows", nargs="+", type=int, default=rows, help="rows of its files")
    parser.add_argument("--json", type=Path, help="file for every figure")
    parser.add_argument("--plot", type=Path, help="PNG file for the ratios")
    options = parser.parse_args()
    batch_sizes = {stage: options.batch_size or BATCH_SIZES[stage] for stage in options.stages}
    if min(options.repeats, options.steps, *batch_sizes.values()) < 1:
        parser.error("--repeats, --steps and --batch_size must be at least 1")
    if options.rows < options.steps * max(batch_sizes.values(), default=0):
        parser.error(f"--rows {options.rows} is less than --steps x --batch_size")

    report: dict[str, Any] = {"options": vars(options) | {"batch_size": batch_sizes}, "stages": {}}
    with tempfile.TemporaryDirectory() as folder:
        for stage in options.stages:
            options.batch_size = batch_sizes[stage]
            write_rows(Path(folder), stage, options)
            try:
                results = compare(stage, Path(folder), options)
            except EOFError:
                sys.exit(f"error: {stage}: a process ended before it had measured; see above")
            report["stages"][stage] = results
            print(table(stage, results), flush=True)
        if options.scaling:
            sizes = options.hidden_size, options.num_hidden_layers
            report["scaling"] = scale(Path(folder), *sizes, options.scaling_rows, options.steps)
            print(scaling_table(report["scaling"]))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2, default=str) + "\n")
    if options.plot:
        plot(report["stages"], options.plot)


def write_rows(folder: Path, stage: str, options: Namespace) -> None:
    """A JSONL file for each repeat: steps spread over those that all `options.rows` rows, sorted, make."""
    longest, mean = LENGTHS[stage]
    rng = np.random.default_rng(1337)
    picture = 64 if stage == "release3" else 196
    text = mean - picture - 30  # without the picture and the words of the chat
    lengths = text * rng.lognormal(-(SPREAD**2) / 2, SPREAD, options.rows)
    size = options.batch_size
    steps = np.argsort(lengths)[: options.rows // size * size].reshape(-1, size)  # rows of each step
    words = [entry["en"] for entry in json.loads((ROOT / "dataset/demo/world.json").read_text())["concepts"]]
    tokens_per_word = 3.2  # of these names, with " and "
    (folder / "images").mkdir(exist_ok=True)
    for repeat in range(options.repeats):
        places = (np.arange(options.steps) + (repeat + 0.5) / options.repeats) * len(steps) / options.steps
        chosen = steps[places.astype(int)].flatten()
        with (folder / f"{stage}_{repeat}.jsonl").open("w") as file:
            for number in rng.permutation(chosen):
                path = folder / "images" / f"{number % PICTURES}.jpg"
                if not path.exists():
                    coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
                    Image.fromarray(coarse).resize((320, 240)).save(path)
                count = max(1, round(min(lengths[number], longest - picture - 34) / tokens_per_word))
                answer = " and ".join(words[i] for i in rng.integers(0, len(words), count))
                file.write(json_line("What is here?", answer, path))


# One stage: a process for each mode, which take turns


def compare(stage: str, folder: Path, options: Namespace) -> dict[str, dict]:
    """Figures of each mode: a list over the repeats, or one value where it cannot vary."""
    spawn = multiprocessing.get_context("spawn")
    workers = {}
    results: dict[str, dict] = {}
    for mode in MODES[:2] if stage == "inference" else MODES:
        own, other = spawn.Pipe()
        process = spawn.Process(target=work, args=(other, stage, mode, folder, options), daemon=True)
        process.start()
        other.close()  # so that the end of the process ends the waiting for it
        workers[mode] = own, process
        results[mode] = own.recv()  # ready, before the next one warms up
    peaks = []
    for repeat in tqdm(range(options.repeats), desc=stage, unit="repeat"):
        peaks.append(matmul_peak(resolve_dtype(options.dtype, device_of(options)), device_of(options)))
        for mode, (pipe, _) in workers.items():
            pipe.send(repeat)
            for name, value in pipe.recv().items():
                results[mode].setdefault(name, []).append(value)
    for mode, (pipe, process) in workers.items():
        pipe.send(None)
        results[mode]["peak_memory_bytes"] = pipe.recv()
        process.join()
    for result in results.values():
        if "flops_per_sample" in result:
            rates = zip(result["flops_per_sample"], result["samples_per_second"], peaks, strict=True)
            result["utilization"] = [flops * rate / peak for flops, rate, peak in rates]
        fastest = "tokens_per_second" if stage == "inference" else "samples_per_second"
        pairs = zip(result[fastest], results["published"][fastest], strict=True)
        result["ratio"] = [mine / theirs for mine, theirs in pairs]
        if "losses" in result:
            theirs = results["published"]["losses"]
            result["loss_difference"] = float(np.abs(np.subtract(result["losses"], theirs)).max())
    results["default"]["matmul_peak_flops"] = peaks
    return results


def work(pipe: Any, stage: str, mode: str, folder: Path, options: Namespace) -> None:
    """A process: builds the model, says that it is ready, measures each repeat that it is asked for."""
    with runtime(options.device, 1337) as run:
        bench = Bench(stage, mode, folder, options, run)
        bench.warm_up()
        pipe.send({})
        while (repeat := pipe.recv()) is not None:
            pipe.send(bench.measure(repeat))
        pipe.send(peak_memory_bytes(run.device))


class Bench:
    """A stage in one mode."""

    def __init__(self, stage: str, mode: str, folder: Path, options: Namespace, run: Any):
        self.stage, self.mode, self.folder, self.options, self.run = stage, mode, folder, options, run
        kind = PublishedVLM if mode == "published" and stage != "inference" else MiniMindVLM
        model, self.processor = random_vlm(options, stage, kind)
        # On a GPU the releases ran under autocast, the encoder included.
        as_published = "float32" if run.device.type == "cpu" else "bfloat16"
        dtype = as_published if mode == "published" else options.dtype
        place(model, run.device, dtype)
        model.register_forward_pre_hook(self.count, with_kwargs=True)
        self.model, self.positions = model, 0
        if stage != "inference":
            set_trainable(self.model, TRAINABLE[stage])
        learning = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        self.initial = {name: parameter.detach().clone() for name, parameter in learning}
        self.flags = VLMTrainingFlags(
            data_path=["-"],
            batch_size=options.batch_size,
            learning_rate=1e-4,
            max_seq_len=LENGTHS[stage][0],
            dtype=dtype,
            compile=options.compile and mode != "published",
            num_workers=getattr(options, "num_workers", 0),  # on two cores they take from what is measured
            log_interval=10**9,
        )

    def count(self, _model: Any, _arguments: tuple, inputs: dict) -> None:
        self.positions += inputs["input_ids"].numel()  # padding included

    def warm_up(self) -> None:
        if self.stage == "inference":
            self.measure(0)
        else:  # whatever has to be compiled is met in a whole repeat
            first = getattr(self.options, "first_steps", None)
            self.train(self.samples(0), max_steps=1 if self.mode == "published" else first)

    def measure(self, repeat: int) -> dict[str, Any]:
        return self.answer(repeat) if self.stage == "inference" else self.learn(repeat)

    def learn(self, repeat: int, max_steps: int | None = None) -> dict[str, Any]:
        samples = self.samples(repeat)
        self.positions = 0
        start = time.perf_counter()
        steps = self.train(samples, max_steps)
        # Workers start, and fill their queue, during the first steps.
        first = len(steps) // 4 if self.flags.num_workers else 0
        seconds = steps[-1]["at"] - (steps[first - 1]["at"] if first else start)
        rows, tokens = (sum(step[name] for step in steps[first:]) for name in ("rows", "tokens"))
        encodes = self.mode != "cached"
        needed = (step_flops(self.model, *(step[name] for name in COUNTS), encodes) for step in steps[first:])
        return {
            "flops_per_sample": sum(needed) / rows,
            "samples_per_second": rows / seconds,
            "tokens_per_second": tokens / seconds,
            "padding": 1 - sum(step["tokens"] for step in steps) / self.positions,
            "losses": [float(step["loss"]) / step["supervised_tokens"] for step in steps],
        }

    def train(self, samples: VLMDataset, max_steps: int | None = None) -> list[dict]:
        self.model.load_state_dict(self.initial, strict=False)  # every mode and repeat starts from the same
        self.flags.max_steps = max_steps
        steps: list[dict] = []  # what each reports: what is timed is training, without saving and writing

        def nothing(*_: Any) -> None: ...

        checkpoints = SimpleNamespace(failure=None, save=nothing, wait=nothing)
        metrics = SimpleNamespace(report=nothing)
        metrics.step = lambda **told: steps.append(told | {"at": time.perf_counter()})
        vars(metrics).update(failure=None, state=dict, paused=nullcontext, bad="")
        total_steps = planned_steps(step_sampler(samples, self.flags, self.run), self.flags)
        with self.working():
            train(self.model, samples, None, self.flags, self.run, metrics, checkpoints, total_steps)
        return steps

    def working(self) -> AbstractContextManager:
        is_published = self.mode == "published"
        return working_as_published(LENGTHS[self.stage][0]) if is_published else nullcontext()

    def samples(self, repeat: int) -> VLMDataset:
        path = self.folder / f"{self.stage}_{repeat}.jsonl"
        samples = VLMDataset([path], self.processor, self.flags.max_seq_len)
        samples.pixels.are_bytes &= self.mode != "published"
        if self.mode == "cached":
            samples.features = FeatureCache(self.folder / "features", self.model, self.processor)
            workers = {"num_workers": self.flags.num_workers}
            encode_missing(samples.features, self.model, self.processor, samples.image_paths(), **workers)
            samples.features.check_complete()
        return samples

    def answer(self, repeat: int) -> dict[str, float]:
        """Answers of a fixed length: each question alone, or in batches."""
        questions = questions_of(self.samples(repeat).rows, "")
        size = 1 if self.mode == "published" else self.options.batch_size
        self.model.eval()
        start, tokens = time.perf_counter(), 0
        with self.working(), autocast(self.flags.dtype, self.run.device):
            for first in range(0, len(questions), size):
                batch = questions[first : first + size]
                features = encode_pictures(self.model, self.processor, batch, size)
                prompts = [encode_question(self.processor, question) for question in batch]
                images = [question.images for question in batch]
                inputs = prepare(self.processor, prompts, images, features).to(self.run.device)
                self.model.generate(
                    **inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS, min_new_tokens=ANSWER_TOKENS
                )
                tokens += ANSWER_TOKENS * len(batch)
        seconds = time.perf_counter() - start
        return {"samples_per_second": len(questions) / seconds, "tokens_per_second": tokens / seconds}


def random_vlm(
    options: Namespace, stage: str = "pretrain", kind: type[MiniMindVLM] = MiniMindVLM
) -> tuple[MiniMindVLM, MiniMindVLMProcessor]:
    """A model of the sizes in `options` with random weights, its encoder's too, and its processor."""
    tokenizer = load_tokenizer(str(ROOT / TOKENIZERS[2]))
    sizes = {"hidden_size": options.hidden_size, "num_hidden_layers": options.num_hidden_layers}
    vision = CLIPVisionConfig(patch_size=16, num_hidden_layers=options.vision_layers)
    image_processor = CLIPImageProcessorPil()
    if stage == "release3":
        sizes |= {**RELEASE_3, "hidden_size": options.hidden_size * 3 // 2}
        vision = SiglipVisionConfig(image_size=256, patch_size=32, num_hidden_layers=options.vision_layers)
        image_processor = SiglipImageProcessorPil(size={"height": 256, "width": 256})
    sizes |= {"use_moe": stage == "moe", "pixel_shuffle": getattr(options, "pixel_shuffle", 1)}
    config = VLMConfig(**sizes, **special_ids(tokenizer), vision_config=vision)
    tokens = {"tokens_per_image": len(config.image_ids)}
    return kind(config, None), MiniMindVLMProcessor(image_processor, tokenizer, **tokens)


# Figures


def matmul_peak(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """Floating-point operations per second of a square matrix product; the best of several."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = math.inf
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_of(options: Namespace) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def table(stage: str, results: dict[str, dict]) -> str:
    """A line for each mode: medians over the repeats, the ratio also with its lowest and highest."""
    names = ("samples/s", "tokens/s", "padding", "of peak", "memory", "ratio", "from", "to", "loss differs")
    lines = ["", f"{stage:<10}" + "".join(f"{name:>13}" for name in names)]
    for mode, result in results.items():
        median = {name: statistics.median(result[name]) for name in MEASURED if name in result}
        cells = (
            f"{median['samples_per_second']:.3f}",
            f"{median['tokens_per_second']:.1f}",
            f"{median['padding']:.1%}" if "padding" in median else "-",
            f"{median['utilization']:.1%}" if "utilization" in median else "-",
            f"{result['peak_memory_bytes'] / 1e9:.2f} GB",
            f"{median['ratio']:.2f}",
            f"{min(result['ratio']):.2f}",
            f"{max(result['ratio']):.2f}",
            f"{result['loss_difference']:.1e}" if "loss_difference" in result else "-",
        )
        lines.append(f"{mode:<10}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
