"""The measurements of gpu.py. Each returns its figures; `Context.until` is when it should come to its end."""

import gc
import os
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import benchmark_chat
import numpy as np
import torch
from benchmark import LENGTHS, Bench, matmul_peak, random_vlm, synchronize, write_rows
from benchmark_scaling import json_line
from PIL import Image
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import trainer.loop
from common.distributed import Runtime, autocast, peak_memory_bytes, resolve_dtype
from common.setup import place
from dataset.collate import collate
from dataset.vlm_dataset import Sample, VLMDataset
from model.model_minimind import MiniMindBlock
from model.processing_vlm import IGNORE_INDEX
from trainer.arguments import VLMTrainingFlags
from trainer.batches import step_loader, step_sampler
from trainer.learner import Learner
from trainer.state import Progress

COMPILED = ("compiled", "graphs")
STAGES = ("pretrain", "sft", "moe", "release3")
CARD_BYTES = 24 * 2**30  # of a 3090 or a 4090
# Dense bf16 products that are summed in fp32: NVIDIA Ampere GA102 GPU Architecture, appendix, RTX 3090.
PEAK_3090 = 71e12
RECIPE = {"pretrain": 595_000 * 4, "sft": 300_000 * 2}  # samples: rows times epochs, as in the README


@dataclass
class Context:
    """What every part gets. `report` is what earlier ones found; `save` writes it down."""

    run: Runtime
    sizes: Namespace
    folder: Path
    report: dict[str, Any]
    save: Callable[[], None]
    until: float = field(default=0.0, init=False)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.until


def sizes(tiny: bool) -> Namespace:
    """Of model, batches and measurements. Batches are those that the issue of launching is judged by."""
    if tiny:
        widths = {"hidden_size": 64, "num_hidden_layers": 2, "vision_layers": 1, "peak": 512, "tokens": 4}
        batches = {"pretrain": 2, "sft": 2, "moe": 2, "release3": 2}
        return Namespace(
            **widths, batches=batches, steps=4, repeats=2, loader_rows=32, most_rows=4, workers=1
        )
    widths = {"hidden_size": 512, "num_hidden_layers": 8, "vision_layers": 12, "peak": 8192, "tokens": 128}
    batches = {"pretrain": 64, "sft": 16, "moe": 64, "release3": 32}
    workers = min(16, os.cpu_count() or 1)
    return Namespace(
        **widths, batches=batches, steps=64, repeats=3, loader_rows=8000, most_rows=1024, workers=workers
    )


def peak(context: Context) -> dict[str, float]:
    """Floating-point operations a second of a large matrix product in the training precision."""
    device = context.run.device
    dtype = resolve_dtype("auto", device)
    return {"dtype": str(dtype), "flops": matmul_peak(dtype, device, context.sizes.peak)}


def stages(context: Context) -> dict[str, dict]:
    """Each stage as published, as by default, and with cached features."""
    found: dict[str, dict] = context.report.setdefault("stages", {})
    for stage in STAGES:
        write_rows(context.folder, stage, options(context, stage))
        for mode in ("published", "default", "cached"):
            measure_mode(context, found.setdefault(stage, {}), stage, mode)
    return found


def compiled(context: Context) -> dict[str, Any]:
    """The default with --compile, into the table of `stages`; compiling takes a minute for each."""
    for stage, found in context.report["stages"].items():
        if stage in STAGES:
            measure_mode(context, found, stage, "default", name="compiled")
    return {}


def graphs(context: Context) -> dict[str, Any]:
    """As `compiled`, with every block but the last, whose sizes differ in each step, replayed as a CUDA graph
    once it has met a shape: what it would be worth to launch nothing one by one."""

    def compile_block(block: MiniMindBlock, **how: Any) -> None:
        is_last = block.self_attn.layer_index == context.sizes.num_hidden_layers - 1
        torch.nn.Module.compile(block, mode="default" if is_last else "reduce-overhead", **how)

    with mock.patch.object(MiniMindBlock, "compile", compile_block):
        for stage in ("pretrain", "sft"):
            measure_mode(context, context.report["stages"][stage], stage, "default", name="graphs")
    return {}


def allocator(context: Context) -> dict[str, Any]:
    """Fine-tuning by default, with memory in segments that grow, into the table of `stages`."""
    if context.run.device.type != "cuda":
        return {"skipped": "only a GPU has an allocator to set"}
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # from some version on
    change = change or torch.cuda.memory._set_allocator_settings
    change("expandable_segments:True")
    try:
        measure_mode(context, context.report["stages"]["sft"], "sft", "default", name="expandable")
    finally:
        change("expandable_segments:False")
    return {}


def options(context: Context, stage: str, compile_layers: bool = False) -> Namespace:
    size, steps = context.sizes.batches[stage], context.sizes.steps
    own = {"batch_size": size, "rows": size * steps, "dtype": "auto", "compile": compile_layers}
    own |= {"first_steps": None if compile_layers else 4, "num_workers": context.sizes.workers}
    return Namespace(**{**vars(context.sizes), **own})


def measure_mode(
    context: Context, found: dict[str, dict], stage: str, mode: str, name: str | None = None
) -> None:
    """Adds the figures of a mode to those of its stage, as `name` if that is given, of COMPILED or not."""
    name = name or mode
    if context.is_over:
        found[name] = {"skipped": "no time was left"}
        return
    device = context.run.device
    bench = None
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        bench = Bench(stage, mode, context.folder, options(context, stage, name in COMPILED), context.run)
        bench.warm_up()
        most = context.sizes.steps // 4 if mode == "published" else None  # which may take ten times as long
        repeats = []
        while len(repeats) < context.sizes.repeats and not (repeats and context.is_over):
            repeats.append(bench.learn(len(repeats), most))
        rates = ("samples_per_second", "tokens_per_second", "padding", "flops_per_sample")
        figures = {key: statistics.median(one[key] for one in repeats) for key in rates}
        figures |= {
            "repeats": [one["samples_per_second"] for one in repeats],
            "last_loss": repeats[-1]["losses"][-1],
        }
        figures["peak_memory_bytes"] = peak_memory_bytes(device)
        if device.type == "cuda":
            figures["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        figures["rows_a_step"] = bench.options.batch_size
        found[name] = figures
        relate(found, context.report.get("peak", {}).get("flops"))
        if mode != "published":
            figures["parts"] = parts_of_a_step(bench, figures["samples_per_second"])
    except Exception as error:  # one mode's lack of memory says nothing about the next
        found[name] = {**found.get(name, {}), "error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(f"   {stage}, {name}: {found[name]['error']}", file=sys.stderr, flush=True)
    del bench
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    context.save()


def relate(found: dict[str, dict], peak_flops: float | None) -> None:
    """Each mode's speed to the published one's, and its share of the peak: what its samples need, without
    padding or waste; less with cached features."""
    for figures in (figures for figures in found.values() if "samples_per_second" in figures):
        rate = figures["samples_per_second"]
        if "samples_per_second" in found.get("published", {}):
            figures["ratio"] = rate / found["published"]["samples_per_second"]
        if peak_flops:
            figures["utilization"] = figures["flops_per_sample"] * rate / peak_flops


def parts_of_a_step(bench: Bench, samples_per_second: float) -> dict[str, float]:
    """Seconds of a step in which kernels compute, in which none does as batches are waited for, and in which
    none does as the CPU still launches: what the profiler's kernels leave of a step without a profiler."""
    step_seconds = bench.options.batch_size / samples_per_second
    waited: list[float] = []

    def timed(*arguments: Any) -> Iterator:
        steps = iter(step_loader(*arguments))
        while True:
            begun = time.perf_counter()
            try:
                step = next(steps)
            except StopIteration:
                return
            waited.append(time.perf_counter() - begun)
            yield step

    steps = max(bench.options.steps // 4, 2)
    with mock.patch.object(trainer.loop, "step_loader", timed):
        bench.train(bench.samples(0), max_steps=steps)
    waiting = statistics.median(waited)
    if bench.run.device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            bench.train(bench.samples(0), max_steps=steps)
            synchronize(bench.run.device)
        ranges = (event.time_range for event in profiler.events() if event.device_type == DeviceType.CUDA)
        computing = union_seconds([(each.start / 1e6, each.end / 1e6) for each in ranges]) / steps
        if not computing:
            raise RuntimeError("the profiler saw no kernel: may it use CUPTI here?")
    else:
        computing = step_seconds - waiting
    computing = min(computing, step_seconds)
    waiting = min(waiting, step_seconds - computing)
    return {"waiting": waiting, "launching": step_seconds - computing - waiting, "computing": computing}


def union_seconds(ranges: list[tuple[float, float]]) -> float:
    """How long at least one of the ranges lasts: kernels may overlap."""
    total, end = 0.0, -1.0
    for start, stop in sorted(ranges):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def largest_batches(context: Context) -> dict[str, Any]:
    """Rows of the longest length that a step of fine-tuning and of pretraining takes within 24 GiB."""
    found: dict[str, Any] = {}
    for stage in ("sft", "pretrain"):
        found[stage] = {"tokens a row": LENGTHS[stage][0], "rows": largest_batch(context, stage)}
    return found


def largest_batch(context: Context, stage: str) -> int:
    device, most = context.run.device, context.sizes.most_rows
    bench = Bench(stage, "default", context.folder, options(context, stage), context.run)
    pixels = bench.samples(0).pixels
    learner = Learner(bench.model, bench.flags, context.run, pixels)

    def fits(rows: int) -> bool:
        try:
            batch = batch_of(rows, LENGTHS[stage][0], bench)
            progress = Progress()
            learner.step(
                [batch], {"supervised_tokens": batch["supervised_tokens"], "rows": rows}, 1e-6, progress
            )
            list(learner.settle(progress))
            return True
        except torch.OutOfMemoryError:
            learner.optimizer.zero_grad(set_to_none=True)
            learner.taken.clear()
            return False
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(CARD_BYTES / total, 1.0), device)
    try:
        rows = 1
        if not fits(rows):
            return 0
        while rows < most and fits(2 * rows) and not context.is_over:
            rows *= 2
        step = rows // 2
        while step >= max(rows // 8, 1) and rows < most and not context.is_over:
            rows += step if fits(rows + step) else 0
            step //= 2
        return rows
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def batch_of(rows: int, length: int, bench: Bench) -> dict[str, Any]:
    """A batch of the longest rows, each with a picture of its own."""
    tokens = bench.processor.tokens_per_image
    ids = [1, *[bench.processor.placeholder_id] * tokens, *[7] * (length - tokens - 1)]
    labels = [IGNORE_INDEX] * (tokens + 1) + ids[tokens + 1 :]
    pixels = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    told = {"pixel_values": pixels, "image_starts": [1]}
    samples = [Sample(ids, labels, images=[str(i)], **told) for i in range(rows)]
    batch = collate(samples, 0, tokens_per_image=tokens)
    return batch | {"rows": rows, "skipped": [], "where": [""] * rows}


def loader(context: Context) -> dict[str, float]:
    """Images a second of the loader alone, 256 x 256 JPEGs, by its number of worker processes."""
    folder, rows = context.folder / "loader", context.sizes.loader_rows
    folder.mkdir()
    generator = np.random.default_rng(1337)
    for i in range(min(rows, 400)):
        coarse = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((256, 256)).save(folder / f"{i}.jpg", quality=85)
    lines = [
        json_line("What is here?", "A red bus and a cat. " * 3, folder / f"{i % 400}.jpg")
        for i in range(rows)
    ]
    (folder / "rows.jsonl").write_text("".join(lines))
    _, processor = random_vlm(Namespace(**{**vars(context.sizes), "hidden_size": 64, "num_hidden_layers": 1}))
    samples = VLMDataset([folder / "rows.jsonl"], processor, 640)
    found = {}
    for workers in (count for count in (1, 2, 4, 8, 16) if count <= max(context.sizes.workers, 1)):
        flags = VLMTrainingFlags(data_path=["-"], batch_size=16, num_workers=workers)
        filling = 2 * workers if rows > 1000 else 0  # steps in which the workers fill their queue
        images, start, seconds = 0, 0.0, 0.0
        loading = step_loader(samples, step_sampler(samples, flags, context.run), flags, context.run)
        for number, step in enumerate(loading):
            if number <= filling:
                start = time.perf_counter()
                continue
            images, seconds = images + step[0]["rows"], time.perf_counter() - start
            if seconds > 4:
                break
        found[f"{workers} workers"] = images / max(seconds, 1e-9)
    return found


def answers(context: Context) -> dict[str, float]:
    """Seconds until an answer's first token, and tokens a second from then on; one question at a time."""
    device = context.run.device
    with autocast("auto", device):
        model, processor = random_vlm(context.sizes)
        place(model.eval(), device, "auto")  # as chat does it, the encoder too
        benchmark_chat.measure(model, processor, context.sizes.tokens)
        repeats = [benchmark_chat.measure(model, processor, context.sizes.tokens) for _ in range(3)]
    return {name: statistics.median(one[name] for one in repeats) for name in repeats[0]}


def recipe(report: dict[str, Any]) -> dict[str, Any]:
    """Hours of the published recipe on an RTX 3090, if it reached the share of its peak measured here. An
    estimate: a slower card is kept busy more easily, but has less memory bandwidth for each operation."""
    hours = {}
    for stage, samples in RECIPE.items():
        figures = report.get("stages", {}).get(stage, {}).get("default", {})
        if "utilization" in figures:
            speed = PEAK_3090 * figures["utilization"]
            hours[stage] = samples * figures["flops_per_sample"] / speed / 3600
    return {"hours on a 3090 (estimate)": hours | {"both": sum(hours.values())}}
