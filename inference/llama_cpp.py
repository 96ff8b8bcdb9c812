"""Asks llama.cpp, where its package xllamacpp is installed, what a trained model is asked, and compares."""

import base64
import importlib.util
import io
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from model.model_vlm import MiniMindVLM
from model.processing_vlm import MiniMindVLMProcessor

NEW_TOKENS = 16
GAP = {"f16": 0.1, "q8_0": 0.5}  # of log probabilities: several times what rounding alone does
Question = tuple[Image.Image | None, str]


class Answer(NamedTuple):
    """Greedy tokens of the source and of llama.cpp. Where they part, `lead` is what the source's own token
    has above the other's logit, else 0. `gaps` are how far log probabilities of llama.cpp's five best tokens
    are from the source's at most, step by step."""

    ours: list[int]
    theirs: list[int]
    lead: float
    gaps: list[float]


def is_installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def check(folder: Path, model: MiniMindVLM, processor: MiniMindVLMProcessor, quantization: str) -> str:
    """Asks about two pictures, or about none where the encoder has a class token, which llama.cpp puts last.
    ValueError where log probabilities differ by more than rounding explains."""
    has_class_token = model.config.vision_config.model_type == "clip_vision_model"
    pictures = [None] if has_class_token else [Image.radial_gradient("L"), Image.linear_gradient("L")]
    answers = ask(folder, model, processor, [(picture, "What is this?") for picture in pictures])
    gap = statistics.median(gap for answer in answers for gap in answer.gaps)
    if not gap <= GAP[quantization]:
        raise ValueError(f"log probabilities of llama.cpp are {gap:.2g} from the source's")
    equal = sum(answer.ours == answer.theirs for answer in answers)
    about = "without a picture" if has_class_token else "about pictures"
    found = f"{equal} of {len(answers)} greedy answers are equal, log probabilities differ by {gap:.2g}"
    return f"llama.cpp was asked {about}: {found}"


def ask(
    folder: Path, model: MiniMindVLM, processor: MiniMindVLMProcessor, questions: list[Question]
) -> list[Answer]:
    """What llama.cpp, with the two files in `folder`, and the source answer to each question about one
    picture, or about none. ValueError for an error of llama.cpp's."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    text, vision = sorted(folder.glob("*.gguf"), reverse=True)
    settings.model.path, settings.mmproj.path = str(text), str(vision)
    settings.n_ctx, settings.warmup, settings.verbosity = 4096, False, -1
    # Its threads wait for each other by spinning: more than one are slow where cores are shared.
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    return [answer(server, model, processor, *question) for question in questions]


@torch.no_grad()
def answer(
    server: Any,
    model: MiniMindVLM,
    processor: MiniMindVLMProcessor,
    picture: Image.Image | None,
    question: str,
) -> Answer:
    content, pictures = [{"type": "text", "text": question}], []
    if picture:
        pictures, buffer = [picture], io.BytesIO()
        picture.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    request = {"messages": [{"role": "user", "content": content}], "max_tokens": NEW_TOKENS, "temperature": 0}
    request |= {"logprobs": True, "top_logprobs": 5, "verbose": True, "return_tokens": True}
    reply = server.handle_chat_completions(request)
    if "error" in reply:
        raise ValueError(f"llama.cpp: {reply['error']['message']}")
    theirs, steps = reply["__verbose"]["tokens"], iter(reply["__verbose"]["completion_probabilities"])
    ids = processor.encode_prompt([{"role": "user", "content": question}], len(pictures))
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**processor.batch([ids], [pictures]), **options)
    ours, logits = output.sequences[0, len(ids) :].tolist(), torch.cat(output.logits)  # (steps, V)
    both = enumerate(zip(ours, theirs, strict=False))
    parting, lead = next((i for i, (mine, other) in both if mine != other), None), 0.0
    if parting is not None:
        lead = (logits[parting, ours[parting]] - logits[parting, theirs[parting]]).item()
    gaps, step = [], next(steps, None)
    for row, token in zip(logits.log_softmax(-1)[: parting and parting + 1], theirs, strict=False):
        if step and step["id"] == token:  # not all are told where a character is several tokens
            gaps.append(max(abs(best["logprob"] - row[best["id"]].item()) for best in step["top_logprobs"]))
            step = next(steps, None)
    return Answer(ours, theirs, lead, gaps)
