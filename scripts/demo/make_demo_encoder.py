"""Trains the demo's encoder, a small CLIPVisionModel, on pictures made of seven teams' drawings.

A throw-away linear head names, for each patch, the thing that covers most of it; another tells where the
patch lies. The held-out style never occurs in training; the score is measured on it. An hour on two cores.
    python scripts/demo/make_demo_encoder.py --steps 4000
    python scripts/demo/make_demo_encoder.py --resume out/demo_encoder/state.pt --steps 5000
"""

import json
import math
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_pictures import PICTURE_SIZE, Sprites, load_sprites, load_world, paint, random_scene
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

ROOT = Path(__file__).resolve().parents[2]
PATCH = 16
GRID = PICTURE_SIZE // PATCH
BACKGROUND = 0  # class 0; thing i of the world is class i + 1
WARMUP_STEPS = 100
EMA_DECAY = 0.998
PLACE_WEIGHT = 0.1


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "model/vision_model/demo-encoder", help="folder")
    parser.add_argument(
        "--state_dir", type=Path, default=ROOT / "out/demo_encoder", help="state and snapshots"
    )
    parser.add_argument(
        "--steps", type=int, default=4000, help="steps in all, those before a resume included"
    )
    parser.add_argument("--decay_steps", type=int, default=900, help="steps at the end with falling rate")
    parser.add_argument("--batch_size", type=int, default=128, help="pictures per step")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="peak, of AdamW and of Muon")
    parser.add_argument("--save_interval", type=int, default=500, help="steps between states and snapshots")
    parser.add_argument("--seed", type=int, default=1337, help="of weights and pictures")
    parser.add_argument("--threads", type=int, default=2, help="threads of the matrix products")
    parser.add_argument("--resume", type=Path, help="a state.pt to go on from")
    train(parser.parse_args())


def train(args: Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    classes = {concept["en"]: number for number, concept in enumerate(load_world()["concepts"], 1)}
    seen, held_out = load_sprites(held_out=False), load_sprites(held_out=True)
    pictures = Pictures(seen, classes, args.batch_size, args.seed)
    tests = {
        "seen": test_pictures(seen, classes, args.seed),
        "held_out": test_pictures(held_out, classes, args.seed),
    }
    model = Namer(len(classes) + 1)
    start_with_principal_components(model, pictures[-1][0])
    # The running mean of the weights is what is scored and kept.
    average = Namer(len(classes) + 1).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimizers = make_optimizers(model, args.learning_rate)
    first_step, seconds_before = resume(args.resume, model, average, optimizers) if args.resume else (0, 0.0)

    # One worker composes the pictures; a step's pictures depend on the seed and the step alone.
    steps = range(first_step, args.steps)
    loader = DataLoader(pictures, batch_size=None, sampler=steps, num_workers=1, prefetch_factor=4)
    started = time.monotonic()
    losses = []
    for step, (images, labels) in zip(steps, loader, strict=True):
        rate = min(1.0, (step + 1) / WARMUP_STEPS, (args.steps - step) / args.decay_steps)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = args.learning_rate * rate
        # Half of the patches, almost twice as fast, until the rate falls; then all.
        patches = some_patches(labels, GRID * GRID // 2) if step < args.steps - args.decay_steps else None
        losses.append(take_step(model, optimizers, images, labels, patches))
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

        done = step + 1
        seconds = seconds_before + time.monotonic() - started
        if done % 50 == 0:
            print(f"step {done} loss {np.mean(losses[-50:]):.4f} seconds {seconds:.0f}", flush=True)
        if done % args.save_interval == 0 or done == args.steps:
            scores = {style: score(average, test) for style, test in tests.items()}
            print(f"step {done} {json.dumps(scores)}", flush=True)
            save_state(args.state_dir, model, average, optimizers, done, seconds)
            folder = args.out if done == args.steps else args.state_dir / "latest"
            save(average, folder, record(args, average, done, seconds, scores))


def make_optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if "layers." in name and parameter.ndim == 2 else others).append(parameter)
    return [
        Muon(matrices, lr=learning_rate, weight_decay=0.05),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05),
    ]


def take_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    images: Tensor,
    labels: Tensor,
    patches: Tensor | None,
) -> float:
    """One update on these patches of these pictures (None: on all); returns the loss."""
    positions = torch.arange(GRID * GRID).expand_as(labels) if patches is None else patches
    names, places = model(images, patches)  # (batch, patches, classes), (batch, patches, positions)
    labels = labels.gather(1, positions)
    loss = F.cross_entropy(names.flatten(0, 1), labels.flatten(), label_smoothing=0.05)
    place_loss = F.cross_entropy(places.flatten(0, 1), positions.flatten())
    (loss + PLACE_WEIGHT * place_loss).backward()
    for optimizer in optimizers:
        if not isinstance(optimizer, Muon):  # its updates have a fixed size anyway
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def save_state(
    folder: Path,
    model: nn.Module,
    average: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    seconds: float,
) -> None:
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "seconds": seconds,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "state.tmp")
    (folder / "state.tmp").rename(folder / "state.pt")


def resume(
    path: Path, model: nn.Module, average: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Loads what `save_state` saved; returns steps and seconds so far."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"]


def record(args: Namespace, model: nn.Module, steps: int, seconds: float, scores: dict) -> dict:
    """What training.json says."""
    world = load_world()
    return {
        "trained_by": "scripts/demo/make_demo_encoder.py",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": "two CPU cores with AVX2, float32, shared with other work",
        "styles": [style for style in world["styles"] if style != world["held_out_style"]],
        "held_out_style": world["held_out_style"],
        "things": len(world["concepts"]),
        "parameters": sum(parameter.numel() for parameter in model.encoder.parameters()),
        "steps": steps,
        "seconds": round(seconds),
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "decay_steps": args.decay_steps,
        "seed": args.seed,
        "optimizer": "Muon for the layers' matrices, AdamW for the rest; weights averaged over steps",
        "patches": "a random half of each picture's until the learning rate falls, then all",
        "place_weight": PLACE_WEIGHT,
        "scores": scores,
        "scores_mean": "share of the things in new pictures that the throw-away head names right",
    }


def save(model: nn.Module, folder: Path, training: dict) -> None:
    """An encoder folder as transformers reads it (fp16), with the recipe beside it."""
    encoder = CLIPVisionModel(model.encoder.config)
    encoder.load_state_dict(model.encoder.state_dict())
    encoder.half().save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": PICTURE_SIZE},
        crop_size={"height": PICTURE_SIZE, "width": PICTURE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")


class Namer(nn.Module):
    """The encoder and the head that is thrown away: uint8 pictures (B, H, W, 3) to logits (B, P, classes)."""

    def __init__(self, classes: int):
        super().__init__()
        config = CLIPVisionConfig(
            image_size=PICTURE_SIZE,
            patch_size=PATCH,
            hidden_size=192,
            intermediate_size=576,
            num_hidden_layers=6,
            num_attention_heads=4,
        )
        self.encoder = CLIPVisionModel(config)
        # Linear on the raw hidden states, as the projection of a language model will be.
        self.head = nn.Linear(config.hidden_size, classes)
        # Naming alone lets the encoder forget where a patch lies, which questions about places need.
        self.position_head = nn.Linear(config.hidden_size, GRID * GRID)

    def forward(self, images: Tensor, patches: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of names (B, P, classes) and of patch positions (B, P, GRID * GRID).

        `patches` (B, K) int64: only these are looked at, and P is K in what comes back.
        """
        pixel_values = images.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
        hidden = self.encoder.embeddings(pixel_values)  # (B, 1 + P, hidden)
        if patches is not None:
            class_token = torch.zeros_like(patches[:, :1])
            tokens = torch.cat([class_token, patches + 1], dim=1)  # (B, 1 + K)
            hidden = hidden.gather(1, tokens[..., None].expand(-1, -1, hidden.size(-1)))
        hidden = self.encoder.encoder(inputs_embeds=self.encoder.pre_layrnorm(hidden)).last_hidden_state
        hidden = hidden[:, 1:]  # without the class token
        return self.head(hidden), self.position_head(hidden)


def some_patches(labels: Tensor, count: int) -> Tensor:
    """(B, count) int64 random patches of each picture, rather such that show something than background."""
    preference = torch.rand(labels.shape) + 0.7 * (labels != BACKGROUND)
    return preference.topk(count, dim=1).indices


def start_with_principal_components(model: Namer, images: Tensor) -> None:
    """Sets the patch embedding to the whitened principal components of real patches: a head start."""
    weight = model.encoder.get_input_embeddings().weight  # (hidden, 3, patch, patch)
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    patches = (
        F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    )  # (B * P, 3 * patch * patch)
    patches = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    values, vectors = values[-len(weight) :], vectors[:, -len(weight) :]
    components = (vectors / (values + values.mean() / 10).sqrt()).T
    weight.data.copy_(components.reshape(weight.shape))


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) in float32. Updates are as large as AdamW's: 0.2 * sqrt(longer side).

    torch's own multiplies in bfloat16: a training step took 0.9 times as long with AMX, 5.9 times on AVX2.
    """

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                direction = orthogonal(parameter.grad.lerp(buffer, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * math.sqrt(max(parameter.shape))
                parameter.add_(direction, alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """(rows, columns) with singular values pushed towards one by five quintic Newton-Schulz steps."""
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Pictures(Dataset):
    """Batch `step` of pictures (B, 96, 96, 3) uint8 and patch labels (B, 36) int64, made when asked for."""

    def __init__(self, sprites: Sprites, classes: dict[str, int], batch_size: int, seed: int):
        self.sprites, self.classes, self.batch_size, self.seed = sprites, classes, batch_size, seed

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, step + 1])
        images = np.empty((self.batch_size, PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
        labels = np.empty((self.batch_size, GRID * GRID), np.int64)
        for row in range(self.batch_size):
            scene = random_scene(rng, self.sprites, large=rng.random() < 0.5)
            picture, masks = paint(rng, scene, self.sprites, partial(varied, rng))
            images[row] = np.asarray(picture)
            covers = coverage(masks)
            classes = np.array([self.classes[thing.name] for thing in scene])
            labels[row] = np.where(covers.max(0) >= 0.2, classes[covers.argmax(0)], BACKGROUND)
        return torch.from_numpy(images), torch.from_numpy(labels)


def coverage(masks: list[Image.Image]) -> np.ndarray:
    """(things, patches) share of each patch that each mask covers."""
    return np.stack([np.asarray(mask.reduce(PATCH), np.float32).ravel() / 255 for mask in masks])


def varied(rng: np.random.Generator, drawing: Image.Image) -> Image.Image:
    """A drawing as another artist might have made it: mirrored, turned, recoloured, flatter, stretched."""
    if rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.1:
        drawing = drawing.quantize(int(rng.integers(3, 9)), Image.Quantize.FASTOCTREE).convert("RGBA")
    drawing = recoloured(rng, drawing)
    if rng.random() < 0.1:  # an outline, dark or light, as some sets have it
        wide = drawing.getchannel("A").filter(ImageFilter.MaxFilter(5 if rng.random() < 0.5 else 3))
        shade = int(rng.choice([0, 40, 255]))
        outlined = Image.merge("RGBA", [Image.new("L", drawing.size, shade)] * 3 + [wide])
        drawing = Image.alpha_composite(outlined, drawing)
    if rng.random() < 0.1:
        drawing = drawing.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.5)))
    if rng.random() < 0.75:
        drawing = drawing.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR, expand=True)
    box = drawing.getbbox()
    drawing = drawing.crop(box) if box else drawing
    stretch = math.exp(rng.uniform(-0.25, 0.25))
    width, height = drawing.width * stretch, drawing.height / stretch
    scale = 64 / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = Image.new("RGBA", (64, 64))
    canvas.paste(drawing.resize(size, Image.Resampling.BILINEAR), ((64 - size[0]) // 2, (64 - size[1]) // 2))
    return canvas


def recoloured(rng: np.random.Generator, drawing: Image.Image) -> Image.Image:
    """Hue, saturation, brightness and contrast changed by one matrix (a turn about the grey axis)."""
    angle = rng.uniform(-np.pi, np.pi) if rng.random() < 0.1 else rng.normal(0, 0.15)
    saturation = 0.0 if rng.random() < 0.08 else rng.uniform(0.5, 1.5)
    contrast = rng.uniform(0.75, 1.25)
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = math.cos(angle) * (np.eye(3) - grey) + math.sin(angle) * cross
    matrix = contrast * (grey + saturation * turn)
    shift = 128 * (1 - contrast) + rng.uniform(-30, 30)
    rows = np.concatenate([matrix, np.full((3, 1), shift)], axis=1)
    colours = drawing.convert("RGB").convert("RGB", tuple(rows.ravel().tolist()))
    colours.putalpha(drawing.getchannel("A"))
    return colours


def test_pictures(sprites: Sprites, classes: dict[str, int], seed: int, count: int = 768) -> list[tuple]:
    """(picture, coverage (things, patches), classes, large) of new pictures, drawings unchanged."""
    rng = np.random.default_rng([seed, 0])
    tests = []
    for _ in range(count):
        scene = random_scene(rng, sprites, large=rng.random() < 0.5)
        picture, masks = paint(rng, scene, sprites)
        named = [classes[thing.name] for thing in scene]
        tests.append((np.asarray(picture), coverage(masks), named, scene[0].cell is None))
    return tests


@torch.no_grad()
def score(model: Namer, tests: list[tuple]) -> dict[str, float]:
    """Share of things named right, large and small apart: patches vote by how much of them a thing covers."""
    right: dict[str, list[bool]] = {"large": [], "small": []}
    for start in range(0, len(tests), 128):
        part = tests[start : start + 128]
        names, _ = model(torch.from_numpy(np.stack([row[0] for row in part])))
        log_probs = names.log_softmax(-1)
        for row, (_, covers, named, large) in zip(log_probs, part, strict=True):
            votes = torch.from_numpy(covers) @ row[:, 1:]  # (things, names), background left out
            guesses = votes.argmax(-1) + 1
            right["large" if large else "small"] += (guesses == torch.tensor(named)).tolist()
    shares = {size: round(float(np.mean(hits)), 4) for size, hits in right.items()}
    return shares | {"all": round(float(np.mean(right["large"] + right["small"])), 4)}


if __name__ == "__main__":
    main()
