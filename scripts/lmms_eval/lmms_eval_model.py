"""lmms-eval with one model more: `minimind_v`, a folder that convert_to_hf.py has exported.

Takes every flag of lmms-eval and needs an environment that has it: test_lmms_eval.sh makes one. Uses nothing
else of this repository, for the exported folder brings its own code. See docs/evaluation_lmms.md.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

try:
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.model import lmms
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest
except ModuleNotFoundError as error:
    command = "bash scripts/lmms_eval/test_lmms_eval.sh"
    sys.exit(f"error: no package {error.name}; make an environment with `{command}`")
from PIL import Image
from tqdm import tqdm

NAME = "minimind_v"
DEFAULT_NEW_TOKENS = 512  # for a task that sets no limit
IMAGE_MARKER = "<image>"


class MiniMindV(lmms):
    """Answers greedily, whatever a task says about sampling, so that a score is the same every time.

    Of a task's generation settings `max_new_tokens` and `until` count. Tasks that compare likelihoods are not
    among the usual ones for vision-language models and are not supported.
    """

    is_simple = False  # it is given messages, not a text with pictures beside it

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "float32",
        **_,
    ) -> None:
        super().__init__()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_size = int(batch_size)
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True)
        self.model = AutoModelForImageTextToText.from_pretrained(
            pretrained, trust_remote_code=True, dtype=getattr(torch, dtype)
        )
        self.model.to(self.device).eval()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers in the order of `requests`, whose `args` are (text, a document's messages, generation
        settings, the document's number, task, split)."""
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: new_tokens(requests[i].args[2]))
        for start in tqdm(range(0, len(order), self.batch_size), desc="answers"):
            batch = order[start : start + self.batch_size]
            settings = [requests[i].args[2] for i in batch]
            texts = self.answer([self.conversation(requests[i]) for i in batch], settings)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text
                self.cache_hook.add_partial(
                    "generate_until", (requests[i].args[0], requests[i].args[2]), text
                )
        return answers

    def conversation(self, request: Instance) -> list[dict[str, Any]]:
        _, messages_of, _, number, task, split = request.args
        return [
            {"role": message["role"], "content": [plain(part) for part in message["content"]]}
            for message in messages_of(self.task_dict[task][split][number])
        ]

    @torch.inference_mode()
    def answer(self, conversations: list[list[dict]], settings: Sequence[dict[str, Any]]) -> list[str]:
        inputs = self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, add_generation_prompt=True
        ).to(self.device)
        limits = [new_tokens(setting) for setting in settings]
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max(limits))  # (B, T + new)
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        decode = self.processor.tokenizer.decode
        texts = [
            decode(ids[:limit], skip_special_tokens=True) for ids, limit in zip(new, limits, strict=True)
        ]
        return [cut(text, setting.get("until")) for text, setting in zip(texts, settings, strict=True)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(f"{NAME} answers questions; tasks of likelihoods are not supported")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(f"{NAME} answers one round; tasks of several rounds are not supported")


def new_tokens(settings: dict[str, Any]) -> int:
    return settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS


def plain(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a message as our processor reads it."""
    if part["type"] == "text":
        # Where pictures go is said by the parts; a marker left in a text would be one picture too many.
        return {"type": "text", "text": part["text"].replace(IMAGE_MARKER, "")}
    picture = part.get("url", part.get("image"))
    if part["type"] != "image" or not isinstance(picture, Image.Image | str):
        raise ValueError(f"{NAME} reads pictures and text, but the task has a part of type {part['type']!r}")
    return {"type": "image", "image": picture}


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """`text` up to the first of the strings that end it."""
    for end in [until] if isinstance(until, str) else until or []:
        text = text.split(end)[0] if end else text
    return text.strip()


def main() -> None:
    MODEL_REGISTRY_V2.register_manifest(
        ModelManifest(NAME, chat_class_path=f"{__name__}.{MiniMindV.__name__}")
    )
    cli_evaluate()


if __name__ == "__main__":
    main()
