"""Two small tasks for lmms-eval, and a model whose score in them is known. Run by test_lmms_eval.sh.

`make FOLDER` trains a model that knows all rows by heart, exports it to FOLDER/hf, and writes the tasks:
twelve rows in POPE's format and six of two pictures in MMMU's, with some answers turned round.
`check FOLDER` compares lmms-eval's results with that.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from datasets import Dataset, Image

from common.setup import build_vlm
from common.tokenizer import load_tokenizer
from common.weights import describe, half_state, save_weights
from inference.pictures import SHIPPED_PICTURES
from model.model_vlm import MiniMindVLM
from model.processing_vlm import image_slots

ENCODER = ROOT / "model/vision_model/demo-encoder"
PICTURES = {
    name: str(ROOT / SHIPPED_PICTURES / file)
    for name, file in {
        "tiger": "drawing_tiger.png",
        "strawberry": "drawing_strawberry.png",
        "sailboat": "drawing_sailboat.png",
        "cup": "photo_coffee.jpg",
    }.items()
}
POPE_PROMPT = "Answer the question using a single word or phrase."
MMMU_PROMPT = "Answer with the option's letter from the given choices directly."
# POPE: of 3 answers "yes" 2 are right, and of 4 that should be "yes" 2 are. MMMU: 5 of 6.
EXPECTED = {
    "pope_local": {
        "pope_accuracy": 9 / 12,
        "pope_precision": 2 / 3,
        "pope_recall": 2 / 4,
        "pope_f1_score": 4 / 7,
        "pope_yes_ratio": 4 / 12,
    },
    "mmmu_local": {"mmmu_acc": 0.83333},  # as MMMU rounds it
}
TURNED_ROUND = {"pope_local": (0, 1, 2), "mmmu_local": (3,)}  # the first "yes", two "no"; a "B"
OTHER = {"yes": "no", "no": "yes", "A": "B", "B": "A"}
TASK = """\
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 128
  temperature: 0
metadata:
  - version: 0.0
lmms_eval_specific_kwargs:
  default: {prompts}
{functions}metric_list:
{metrics}
"""
FUNCTION = "doc_to_{name}: !function utils.{family}_doc_to_{name}\n"
METRIC = "  - metric: {name}\n    aggregation: !function utils.{aggregation}\n    higher_is_better: true"


def main() -> None:
    command, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    {"make": make, "check": check}[command](folder)


def make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pope, mmmu = pope_rows(), mmmu_rows()
    chats = [(f"<image>\n{row['question']}\n{POPE_PROMPT}", row["answer"], [row["image"]]) for row in pope]
    for row in mmmu:
        # The pieces between the pictures become lines of their own.
        question = "First\n<image>\n, then\n<image>\n. Which shows a tiger?\nA. the first\nB. the second"
        chats.append((f"{question}\n\n{MMMU_PROMPT}", row["answer"], [row["image_1"], row["image_2"]]))
    weights = train(chats, folder / "local_96.pth")
    export = ["convert_to_hf.py", "--weight", weights, "--out", folder / "hf"]
    subprocess.run([sys.executable, *map(str, export)], cwd=ROOT, check=True)
    write_task(
        folder, "pope", pope, {"pre_prompt": "", "post_prompt": f"\n{POPE_PROMPT}"}, ["visual", "text"]
    )
    prompts = {"prompt_type": "format", "multiple_choice_prompt": MMMU_PROMPT, "open_ended_prompt": ""}
    write_task(folder, "mmmu", mmmu, prompts, ["visual", "text", "messages"])


def pope_rows() -> list[dict[str, Any]]:
    asked = [(shown, thing) for shown in PICTURES for thing in ("tiger", "strawberry", "sailboat")]
    return [
        {
            "question_id": str(number),
            "question": f"Is there a {thing} in the image?",
            "answer": "yes" if thing == shown else "no",
            "image": PICTURES[shown],
        }
        for number, (shown, thing) in enumerate(asked)
    ]


def mmmu_rows() -> list[dict[str, Any]]:
    others = [name for name in PICTURES if name != "tiger"]
    pairs = [("tiger", name) for name in others] + [(name, "tiger") for name in others]
    return [
        {
            "id": f"validation_Art_{number}",
            "question": "First <image 1>, then <image 2>. Which shows a tiger?",
            "options": "['the first', 'the second']",
            "question_type": "multiple-choice",
            "answer": "A" if first == "tiger" else "B",
            "image_1": PICTURES[first],
            "image_2": PICTURES[second],
        }
        for number, (first, second) in enumerate(pairs)
    ]


def train(chats: list[tuple[str, str, list[str]]], path: Path) -> Path:
    """Weights that give each question's answer."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    tokenizer = load_tokenizer(str(ROOT / "model/tokenizer"))
    model, processor = build_vlm(sizes, str(ENCODER), tokenizer)
    rows = [
        processor.encode_chat(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], len(pictures)
        )
        for question, answer, pictures in chats
    ]
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])  # (B, T)
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])  # (B, T)
    counts = torch.tensor([len(pictures) for *_, pictures in chats])  # (B,)
    pixel_values = processor.pixel_values([path for *_, pictures in chats for path in pictures])
    features = MiniMindVLM.get_image_embeddings(pixel_values, model.vision_encoder)  # (sum of counts, P, W)
    images = {"image_features": image_slots(features, counts), "image_counts": counts}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(600):
        loss = model(input_ids, labels=labels, **images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.003:
            break
    else:
        sys.exit(f"error: the model did not learn its rows, loss {loss:.4f}")
    sidecar = describe(model, tokenizer, "sft_vlm", 1, {"vision_model_path": str(ENCODER)})
    save_weights(path, half_state(model.state_dict()), sidecar)
    return path


def write_task(
    folder: Path, family: str, rows: list[dict], prompts: dict[str, str], functions: list[str]
) -> None:
    """The rows as the benchmark stores them, and its task with its own functions, on a local file."""
    task = f"{family}_local"
    for number in TURNED_ROUND[task]:
        rows[number]["answer"] = OTHER[rows[number]["answer"]]
    table = Dataset.from_list(rows)
    for column in [name for name in table.column_names if name.startswith("image")]:
        table = table.cast_column(column, Image())
    place = folder / "tasks" / family
    place.mkdir(parents=True, exist_ok=True)
    table.to_parquet(place / "rows.parquet")
    metrics = []
    for name in EXPECTED[task]:
        aggregation = name.replace("pope", "pope_aggregate") if family == "pope" else "mmmu_aggregate_results"
        metrics.append(METRIC.format(name=name, aggregation=aggregation))
    lines = "".join(FUNCTION.format(name=name, family=family) for name in functions)
    text = TASK.format(
        task=task,
        data=place / "rows.parquet",
        prompts=json.dumps(prompts),
        functions=f"{lines}process_results: !function utils.{family}_process_results\n",
        metrics="\n".join(metrics),
    )
    (place / f"{task}.yaml").write_text(text, encoding="utf-8")
    (place / "utils.py").write_text(f"from lmms_eval.tasks.{family}.utils import *\n", encoding="utf-8")


def check(folder: Path) -> None:
    path = next(folder.glob("results/**/*_results.json"), None)
    if path is None:
        sys.exit(f"error: no scores in {folder}/results: lmms-eval has failed, see above")
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    for task, scores in EXPECTED.items():
        found = {name: results[task][f"{name},none"] for name in scores}
        print(task, json.dumps(found))
        if any(abs(found[name] - score) > 1e-6 for name, score in scores.items()):
            sys.exit(f"error: {task}: expected {json.dumps(scores)}")
    print("lmms-eval gave the known scores")


if __name__ == "__main__":
    main()
