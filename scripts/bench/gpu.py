"""Asks a GPU everything in one run, for docs/benchmarks.md; gpu.sh starts it, docs/gpu.md explains its table.

The parts come in the order of SHARES, so that a cut leaves the first; gpu.json and gpu.md are written anew
after each. A part that fails is noted with its error, and the next one runs. Nothing is downloaded: pictures
and weights are random.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
NEEDED = "torch transformers datasets huggingface_hub pyarrow pytest".split()
# What a machine with torch alone lacks, and what these need in turn.
WHEELS = "transformers tokenizers huggingface_hub hf-xet datasets dill multiprocess httpx2 httpcore2"
WHEELS += " truststore rich"
# Of the time that is left, at most.
SHARES = {"about": 0.02, "tests": 0.4, "peak": 0.02, "stages": 0.45, "compiled": 0.6, "graphs": 0.4}
SHARES |= {"allocator": 0.3, "batch": 0.5, "loader": 0.5, "answers": 0.5, "recipe": 1.0}
TABLE = ("samples/s", "tokens/s", "of peak", "memory", "ratio", "waiting", "launching", "computing")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=8, help="what is not done by then is left out")
    parser.add_argument("--device", help="cuda or cpu; if not given: the best there is")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that it works, and no more")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=[*SHARES], help="what is asked")
    parser.add_argument("--out_dir", type=Path, default=Path("out/gpu"), help="folder for gpu.json, gpu.md")
    flags = parser.parse_args()
    if problem := lacking():
        print(f"error: {problem}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder, "cache"))
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        report = ask(flags, Path(folder))
    if failed := failures(report):
        print(f"error: failed: {', '.join(failed)}; {flags.out_dir / 'gpu.json'} says why", file=sys.stderr)
    return 1 if failed else 0


def failures(report: dict[str, Any]) -> list[str]:
    """The parts, stages and modes that have an error."""
    found = []
    for name, part in report.items():
        if isinstance(part, dict):
            found += [name] if "error" in part else []
            found += [f"{name} {inner}" for inner in failures(part)]
    return found


def lacking() -> str:
    """Which packages are missing or too old, with the wheels that would help; "" if all is there."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().split()]
    wanted = {requirement.name: requirement for requirement in wanted}
    problems = []
    for name in NEEDED:
        requirement = wanted.get(name, Requirement(name))
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"no {name}")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{name} {version}, expected {requirement.specifier}")
    if not problems:
        return ""
    pins = [line for line in (ROOT / "constraints.txt").read_text().split()]
    wheels = [pin for pin in pins if pin.split("==")[0] in WHEELS.split()]
    return f"{'; '.join(problems)}: bring wheels of {' '.join(wheels)} in $GPU_WHEELS (docs/gpu.md)"


def ask(flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs the parts and writes gpu.json and gpu.md; returns what was found."""
    import gpu_parts

    from common.distributed import runtime
    from dataset.files import write_atomically

    logging.basicConfig(level=logging.WARNING)
    report: dict[str, Any] = {"flags": {name: str(value) for name, value in vars(flags).items()}}
    end = time.monotonic() + flags.minutes * 60

    def save() -> None:
        contents = {"gpu.json": json.dumps(report, indent=2, default=str) + "\n", "gpu.md": table(report)}
        for name, content in contents.items():
            write_atomically(flags.out_dir / name, lambda file, text=content: file.write(text.encode()))

    with runtime(flags.device, 1337) as run:
        context = gpu_parts.Context(run, gpu_parts.sizes(flags.tiny), folder, report, save)
        asked: dict[str, Callable[[], Any]] = {
            "about": lambda: about(run.device),
            "tests": lambda: gpu_tests(run.device, context.until - time.monotonic()),
            "peak": lambda: gpu_parts.peak(context),
            "stages": lambda: gpu_parts.stages(context),
            "compiled": lambda: gpu_parts.compiled(context),
            "graphs": lambda: gpu_parts.graphs(context),
            "allocator": lambda: gpu_parts.allocator(context),
            "batch": lambda: gpu_parts.largest_batches(context),
            "loader": lambda: gpu_parts.loader(context),
            "answers": lambda: gpu_parts.answers(context),
            "recipe": lambda: gpu_parts.recipe(report),
        }
        for name in (name for name in SHARES if name in flags.parts):
            left = end - (begun := time.monotonic())
            print(f"== {name}, {left:.0f} s are left", file=sys.stderr, flush=True)
            context.until = begun + left * SHARES[name]
            try:
                found = asked[name]() if left > 0 else {"skipped": f"the {flags.minutes:g} minutes were over"}
            except Exception as error:  # whatever it is, the next part may tell something
                found = {**report.get(name, {}), "error": f"{type(error).__name__}: {error}"}
            report[name] = found | {"seconds": round(time.monotonic() - begun, 1)}
            save()
            if "error" in found:
                print(f"   {found['error']}", file=sys.stderr, flush=True)
    print(table(report))
    return report


def about(device: Any) -> dict[str, Any]:
    """Versions, and the card as nvidia-smi has it."""
    import torch

    found = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "cpus": os.cpu_count()}
    found |= {name: importlib.metadata.version(name) for name in NEEDED}
    found |= {"device": str(device), "card": platform.processor() or platform.machine()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"card": card.name, "memory_bytes": card.total_memory, "cuda": torch.version.cuda}
        query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            found["driver, clocks, power"] = done.stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            found["driver, clocks, power"] = str(error)
    return found


def gpu_tests(device: Any, seconds: float) -> dict[str, Any]:
    """tests/gpu in a process of its own: how many passed, those that were skipped, and why others failed; so
    far, where it takes longer than `seconds`."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-rfE",
        "-m",
        "gpu",
        "tests/gpu",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"GPU_TESTS_ON": device.type}
    settings = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **settings, start_new_session=True) as process:
        try:
            told, _ = process.communicate(timeout=seconds)
            problem = ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what a test has started
            told, _ = process.communicate()
            problem = f"not through in {seconds:.0f} s"
    lines = told.decode(errors="replace").splitlines()
    outcomes = [
        found.groups() for line in lines if (found := re.match(r"(tests/\S+::.*) (PASSED|SKIPPED)", line))
    ]
    found = {"passed": sum(how == "PASSED" for _, how in outcomes)}
    found["skipped"] = [name for name, how in outcomes if how == "SKIPPED"]
    found["failed"] = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if not (outcomes or problem):
        problem = "\n".join(lines[-20:])
    problem = problem or (f"{len(found['failed'])} tests failed" if found["failed"] else "")
    return found | ({"error": problem} if problem else {})


def table(report: dict[str, Any]) -> str:
    """Markdown for docs/benchmarks.md."""
    card = report.get("about", {})
    lines = [f"{card.get('card')}, torch {card.get('torch')}, {card.get('date')}", ""]
    lines += ["| | " + " | ".join(TABLE) + " |", "| --- |" + " --- |" * len(TABLE)]
    for stage, modes in report.get("stages", {}).items():
        for mode, row in modes.items() if isinstance(modes, dict) else ():
            if "samples_per_second" not in row:
                lines.append(f"| {stage}, {mode} | {row.get('error') or row.get('skipped')} |")
                continue
            parts = row.get("parts", {})
            cells = [f"{row['samples_per_second']:.1f}", f"{row['tokens_per_second']:.0f}"]
            cells += [f"{row['utilization']:.1%}" if "utilization" in row else ""]
            cells += [f"{row['peak_memory_bytes'] / 1e9:.2f} GB", f"{row.get('ratio', 1):.2f}"]
            cells += [f"{1e3 * parts[name]:.1f} ms" if parts else "" for name in TABLE[-3:]]
            lines.append(f"| {stage}, {mode} | " + " | ".join(cells) + " |")
    others = {
        name: report[name]
        for name in ("tests", "peak", "batch", "loader", "answers", "recipe")
        if name in report
    }
    lines += ["", *(f"- {name}: {json.dumps(found)}" for name, found in others.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
