"""Asks llama.cpp what it makes of a folder written by `convert_to_hf.py --format gguf`, and rates its answers
by the source. Needs xllamacpp, a build of llama.cpp for Python, which is not among our requirements."""

import base64
import importlib.util
import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from model.model_vlm import MiniMindVLM
from model.processing_vlm import MiniMindVLMProcessor

NEAR = {"f16": 0.05, "q8_0": 0.5}  # logits: rounding may decide between tokens that are as near as this
NEW_TOKENS = 16


class Answer(NamedTuple):
    """llama.cpp's greedy tokens. `lead` is how far, at most, the source's best logit is above that of one of
    them: 0 where greedy text is equal. `gap` is how far apart log probabilities of the likeliest five are at
    the first token, None where that is a part of a character, of which llama.cpp tells nothing."""

    tokens: list[int]
    lead: float
    gap: float | None


def is_installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def compare(folder: Path, model: MiniMindVLM, processor: MiniMindVLMProcessor) -> str:
    """Says how many answers are equal. ValueError if most are not, up to rounding, which chooses between
    experts as well; with a class token, which llama.cpp takes for a patch, that is no fault of the folder."""
    pictures = [Image.radial_gradient("L").rotate(turn, fillcolor=turn) for turn in (0, 30, 60, 90)]
    answers = ask(folder, model, processor, [(picture, "What is this?") for picture in pictures])
    quantization = next(folder.glob("model-*.gguf")).stem.removeprefix("model-")
    equal, near = (sum(it.lead <= bound for it in answers) for bound in (0, NEAR[quantization]))
    found = f"{equal} of {len(answers)} answers of llama.cpp equal the source's, {near} up to rounding"
    if near < len(answers) / 2 and not hasattr(model.vision_encoder.embeddings, "class_embedding"):
        raise ValueError(found)
    return found


def ask(
    folder: Path,
    model: MiniMindVLM,
    processor: MiniMindVLMProcessor,
    questions: list[tuple[Image.Image | None, str]],
) -> list[Answer]:
    """llama.cpp's answers to questions, each about one picture or none."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    vision, text = sorted(folder.glob("*.gguf"))
    settings.model.path, settings.mmproj.path = str(text), str(vision)
    settings.n_ctx, settings.warmup, settings.verbosity = 4096, False, -1
    # Its threads wait for each other by spinning: more than one are slow where cores are shared.
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    return [rated(request(server, *question), model, processor, *question) for question in questions]


def request(server: Any, picture: Image.Image | None, question: str) -> dict:
    content = [{"type": "text", "text": question}]
    if picture:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    options = {"temperature": 0, "max_tokens": NEW_TOKENS, "logprobs": True, "top_logprobs": 5}
    options |= {"verbose": True, "return_tokens": True}
    reply = server.handle_chat_completions({"messages": [{"role": "user", "content": content}], **options})
    if "__verbose" not in reply:
        raise ValueError(f"llama.cpp does not answer: {reply['error']['message']}")
    return reply["__verbose"]


@torch.no_grad()
def rated(
    reply: dict,
    model: MiniMindVLM,
    processor: MiniMindVLMProcessor,
    picture: Image.Image | None,
    question: str,
) -> Answer:
    tokens = reply["tokens"] or [processor.tokenizer.eos_token_id]  # it ended at once
    first = (reply.get("completion_probabilities") or [{}])[0]  # none where no character is whole
    pictures = [picture] if picture else []
    prompt = processor.encode_prompt([{"role": "user", "content": question}], len(pictures))
    inputs = processor.batch([prompt + tokens[:-1]], [pictures])
    logits = model(**inputs, logits_to_keep=len(tokens)).logits[0]  # (T, V)
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]  # (T,)
    lead, gap = (logits.max(-1).values - chosen).max().item(), None
    if first.get("id") == tokens[0]:
        likely = {token["id"]: token["logprob"] for token in first["top_logprobs"]}
        gap = max(abs(logits[0].log_softmax(-1)[i].item() - value) for i, value in likely.items())
    return Answer(tokens, lead, gap)
