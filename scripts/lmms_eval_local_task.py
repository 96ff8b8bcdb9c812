"""A POPE task of twelve rows, and a model whose score in it is known. Run by scripts/test_lmms_eval.sh.

`make FOLDER` trains a model that knows the rows by heart, exports it to FOLDER/hf, and writes the task, in
which three of the twelve answers are turned round. `check FOLDER` compares lmms-eval's result with that.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from datasets import Dataset, Features, Image, Value

from model.model_vlm import MiniMindVLM
from trainer.checkpoint import describe, half_state, save_weights
from trainer.setup import build_vlm
from trainer.tokenizer import load_tokenizer

PICTURES = {
    "tiger": "drawing_tiger.png",
    "strawberry": "drawing_strawberry.png",
    "sailboat": "drawing_sailboat.png",
}
PICTURES["cup"] = "photo_coffee.jpg"
ASKED = ("tiger", "strawberry", "sailboat")
POST_PROMPT = "\nAnswer the question using a single word or phrase."  # POPE's own
TURNED_ROUND = (0, 1, 2)  # one "yes" and two "no"
# 2 of 3 "yes" are right, and 2 of 4 true ones are found.
EXPECTED = {"accuracy": 9 / 12, "precision": 2 / 3, "recall": 2 / 4, "f1_score": 4 / 7, "yes_ratio": 4 / 12}
ENCODER = ROOT / "model/vision_model/demo-encoder"

TASK = """\
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
task: pope_local
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pope_doc_to_visual
doc_to_text: !function utils.pope_doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 128
  temperature: 0
process_results: !function utils.pope_process_results
metric_list:
{metrics}
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: {post_prompt}
metadata:
  - version: 0.0
"""
METRIC = """\
  - metric: pope_{name}
    aggregation: !function utils.pope_aggregate_{name}
    higher_is_better: true"""


def main() -> None:
    command, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    {"make": make, "check": check}[command](folder)


def make(folder: Path) -> None:
    rows = [
        {
            "question_id": str(number),
            "question": f"Is there a {thing} in the image?",
            "answer": "yes" if thing == shown else "no",
            "image": str(ROOT / "dataset/eval_images" / PICTURES[shown]),
        }
        for number, (shown, thing) in enumerate((shown, thing) for shown in PICTURES for thing in ASKED)
    ]
    weights = train(rows, folder / "pope_64.pth")
    export = ["convert_to_hf.py", "--weight", weights, "--out", folder / "hf"]
    subprocess.run([sys.executable, *map(str, export)], cwd=ROOT, check=True)
    write_task(rows, folder / "task")


def train(rows: list[dict[str, str]], path: Path) -> Path:
    torch.manual_seed(0)
    sizes = dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    tokenizer = load_tokenizer(str(ROOT / "model/tokenizer"))
    model, processor = build_vlm(sizes, str(ENCODER), tokenizer)
    chats = [
        processor.encode_chat(
            [
                {"role": "user", "content": f"<image>\n{row['question']}{POST_PROMPT}"},
                {"role": "assistant", "content": row["answer"]},
            ],
            1,
        )
        for row in rows
    ]
    longest = max(len(ids) for ids, _ in chats)
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in chats])  # (B, T)
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in chats])  # (B, T)
    pixel_values = processor.pixel_values([row["image"] for row in rows])  # (B, 3, H, W)
    features = MiniMindVLM.get_image_embeddings(pixel_values, model.vision_encoder)[:, None]  # (B, 1, P, W)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(400):
        loss = model(input_ids, image_features=features, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.005:
            break
    else:
        sys.exit(f"error: the model did not learn its twelve rows, loss {loss:.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    sidecar = describe(model, tokenizer, "sft_vlm", 1, {"vision_model_path": str(ENCODER)})
    save_weights(path, half_state(model.state_dict()), sidecar)
    return path


def write_task(rows: list[dict[str, str]], folder: Path) -> None:
    """The rows as POPE stores them, and its task with its own functions, on a file instead of the hub."""
    folder.mkdir(exist_ok=True)
    for number in TURNED_ROUND:
        rows[number]["answer"] = {"yes": "no", "no": "yes"}[rows[number]["answer"]]
    text = {name: Value("string") for name in ("question_id", "question", "answer")}
    Dataset.from_list(rows, features=Features({**text, "image": Image()})).to_parquet(folder / "rows.parquet")
    metrics = "\n".join(METRIC.format(name=name) for name in EXPECTED)
    values = {"data": folder / "rows.parquet", "metrics": metrics, "post_prompt": json.dumps(POST_PROMPT)}
    (folder / "pope_local.yaml").write_text(TASK.format(**values), encoding="utf-8")
    (folder / "utils.py").write_text(
        "from lmms_eval.tasks.pope.utils import *  # noqa: F403\n", encoding="utf-8"
    )


def check(folder: Path) -> None:
    newest = max(folder.glob("results/**/*_results.json"), key=lambda path: path.stat().st_mtime)
    results = json.loads(newest.read_text(encoding="utf-8"))["results"]["pope_local"]
    found = {name: results[f"pope_{name},none"] for name in EXPECTED}
    print(json.dumps(found))
    if any(abs(found[name] - expected) > 1e-6 for name, expected in EXPECTED.items()):
        sys.exit(f"error: expected {json.dumps(EXPECTED)}")
    print("lmms-eval gave the known score")


if __name__ == "__main__":
    main()
