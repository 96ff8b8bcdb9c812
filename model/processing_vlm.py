"""Pictures and messages -> what MiniMindVLM reads; the only place that builds a prompt.

Training, evaluation, the web demo and exported folders all use MiniMindVLMProcessor. The chat format itself
is the tokenizer's chat template; here `<image>` becomes placeholders, and answers get labels.
Shapes: B rows, N most images of a row, P placeholder tokens per image, T tokens.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .pictures import to_rgb

IMAGE_MARKER = "<image>"
PLACEHOLDERS = ("<|image_pad|>", "@")  # of release 3 and of release 2, whichever the tokenizer has
IGNORE_INDEX = -100
ROLES = ("system", "user", "assistant")
THINKING = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*(.*)", re.DOTALL)
# Values of the library's options that mean what happens anyway.
NO_CHANGE = {"padding": (True, "longest"), "truncation": (False,), "return_tensors": ("auto",)}
NO_CHANGE |= {"add_special_tokens": (False,), "load_audio_from_video": (False,)}


class MiniMindVLMProcessor(ProcessorMixin):
    """Joins an image processor and the tokenizer. `tokens_per_image` is P, the encoder's patch tokens: 196
    for CLIP-ViT-B/16 at 224 pixels. `placeholder` is the token that stands for an image P times."""

    model_input_names = ["input_ids", "attention_mask", "pixel_values", "image_counts"]  # noqa: RUF012

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, tokens_per_image: int = 196):
        self.tokens_per_image = tokens_per_image
        self.image_token = IMAGE_MARKER
        chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        if image_processor is None:  # the text stage; the library insists on both parts
            self.image_processor, self.tokenizer, self.chat_template = None, tokenizer, chat_template
        else:
            super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.placeholder = PLACEHOLDERS[PLACEHOLDERS[0] not in tokenizer.added_tokens_encoder]
        self.placeholder_id = tokenizer.convert_tokens_to_ids(self.placeholder)
        self.images_apart: bool | None = None  # not known yet

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As transformers has it, with the same image processor whether or not torchvision is installed."""
        return super().from_pretrained(pretrained_model_name_or_path, **{"backend": "pil", **kwargs})

    @property
    def image_size(self) -> int | None:
        """The pixels of the shorter side that preprocessing scales pictures to; None if it scales none."""
        settings = self.image_processor
        scaled = getattr(settings, "do_resize", False) and getattr(settings, "size", None)
        return max(dict(scaled).values()) if scaled else None

    def encode_chat(self, messages: Sequence[dict], num_images: int = 0) -> tuple[list[int], list[int]]:
        """Token ids and labels of a whole conversation, for training. Labels are unshifted: an assistant
        turn's content, its `<|im_end|>` and the newline; -100 elsewhere. ValueError for an unknown role, a
        blank assistant turn, or `<image>` markers that differ from `num_images`."""
        messages = self._expand(messages, num_images)
        if any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
            raise ValueError("an assistant turn is empty")
        return self._encode(messages)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text between a turn's control tokens; ValueError if it looks like an image."""
        ids = self.tokenizer._encode_without_added_tokens(self._with_placeholders([text]))
        return [self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id]

    def encode_prompt(self, messages: Sequence[dict], num_images: int = 0) -> list[int]:
        """Token ids of a conversation that the assistant is to continue."""
        return self._encode(self._expand(messages, num_images), add_generation_prompt=True)[0]

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        sanitize_control_tokens: bool = True,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """As transformers has it, but text such as `<|im_start|>` inside a message stays text by default.
        Pictures come inside the messages (`{"type": "image", "path": ...}`), or in
        `processor_kwargs["images"]`, a list for each conversation; with `tokenize=True, return_dict=True` the
        result feeds `generate`. Without `tokenize`: text with `<image>` marks, for `__call__`. ValueError for
        an argument that neither the template nor `batch` knows."""
        template = self._resolve_chat_template(chat_template)
        rendering = {name: kwargs.pop(name) for name in [*kwargs] if re.search(rf"\b{name}\b", template)}
        rendering |= {"chat_template": template, "add_generation_prompt": add_generation_prompt}
        rendering["continue_final_message"] = continue_final_message
        conversations, is_batched = self._normalize_conversations(conversation)
        keys = ("image", "url", "path", "base64")
        images = [[part[k] for part in _image_parts(m) for k in keys if k in part] for m in conversations]
        options = kwargs | (processor_kwargs or {})
        if (given := options.pop("images", None)) is not None:
            images = given if is_batched else [given]
        options = _checked(options)
        if not tokenize:
            turns = [self._expand(messages, None) for messages in conversations]
            rows = [self.tokenizer.apply_chat_template(each, tokenize=False, **rendering) for each in turns]
            return rows if is_batched else rows[0]
        pairs = zip(conversations, images, strict=True)
        turns = [self._expand(messages, len(pictures)) for messages, pictures in pairs]
        rows = [self._encode(each, sanitize_control_tokens, **rendering)[0] for each in turns]
        if not return_dict and "return_tensors" not in options:
            return rows if is_batched else rows[0]
        batch = self.batch(rows, images, **options)
        return batch if return_dict else batch["input_ids"]

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """Prompts that are already text, with `<image>` where pictures go. `images`: for one text a picture
        or a list; for several texts a list of pictures for each, or a flat list that the texts' markers share
        out. Without `text`, only `pixel_values` of the pictures. ValueError where markers and pictures differ
        in number, and for `kwargs` that `batch` does not take: rows are never cut, always padded to the
        longest one and returned as tensors."""
        options = {"padding_side": self.tokenizer.padding_side, **_checked(kwargs)}
        if text is None:
            data = {"pixel_values": self.pixel_values(_flat(images))}
            return BatchFeature(data, options.get("return_tensors"))
        texts = [text] if isinstance(text, str) else list(text)
        pictures = self._share_out(texts, images)
        begins = re.compile(rf"(?<={re.escape(self.tokenizer.bos_token)}assistant\n)")  # answers stand apart
        rows = []
        for row, (prompt, row_pictures) in enumerate(zip(texts, pictures, strict=True)):
            if (found := prompt.count(IMAGE_MARKER)) != (given := len(row_pictures)):
                raise ValueError(f"text {row}: {found} {IMAGE_MARKER} markers, but {given} images")
            spans = begins.split(self._with_placeholders(prompt.split(IMAGE_MARKER)))
            rows.append([i for span in spans for i in self.tokenizer.encode(span, add_special_tokens=False)])
        return self.batch(rows, pictures, **options)

    def batch(
        self, rows: list[list[int]], images: list[list], padding_side="left", return_tensors: str = "pt"
    ) -> BatchFeature:
        """Pads `rows` to the longest: input_ids, attention_mask (B, T) and, if there are any pictures,
        pixel_values (B, N, 3, H, W) with image_counts (B,); arrays with `return_tensors="np"`."""
        pad = partial(pad_sequence, batch_first=True, padding_side=padding_side)
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        data = {"input_ids": pad(tensors, padding_value=self.tokenizer.pad_token_id)}  # (B, T)
        data["attention_mask"] = pad([torch.ones_like(row) for row in tensors])  # (B, T)
        counts = torch.tensor([len(pictures) for pictures in images])
        if counts.sum():
            flat = self.pixel_values(_flat(images))  # (sum of counts, 3, H, W)
            data |= {"pixel_values": image_slots(flat, counts), "image_counts": counts}  # (B, N, 3, H, W)
        return BatchFeature(data, return_tensors)

    def pixel_values(self, images: list) -> torch.Tensor:
        """Preprocessed (len(images), 3, H, W), fp32, of pictures as `to_rgb` takes them, with its errors."""
        images = [to_rgb(image, self.image_size) for image in images]
        return self.image_processor(images, return_tensors="pt")["pixel_values"]

    def _expand(self, messages: Sequence[dict], num_images: int | None) -> list[dict[str, str]]:
        """Messages with plain string contents; with images, user turns have `pieces`, what stands around each
        `<image>`, which is text otherwise. `num_images` None: as many as image parts, and `<image>` stays."""
        inside, marked = len(_image_parts(messages)), num_images is None
        num_images = inside if marked else num_images
        pictured = num_images > 0 or inside > 0
        turns = [{"role": m["role"], "content": _as_text(m.get("content"))} for m in messages]
        for number, turn in enumerate(turns, start=1):
            if (role := turn["role"]) not in ROLES:
                raise ValueError(f"turn {number}: unknown role {role!r}, expected one of {', '.join(ROLES)}")
            if role == "assistant":
                # The generation prompt ends in a newline of its own, so an answer never starts with one.
                turn["content"] = turn["content"].lstrip("\n")
        users = [turn for turn in turns if turn["role"] == "user"]
        found = sum(turn["content"].count(IMAGE_MARKER) for turn in users) if pictured else 0
        if num_images and not found and users:
            users[0]["content"] = f"{IMAGE_MARKER}\n" * num_images + users[0]["content"]
            found = num_images
        if found != num_images:
            raise ValueError(f"{found} {IMAGE_MARKER} markers in the user's turns, but {num_images} images")
        for turn in users if pictured and not marked else ():
            turn["pieces"] = turn["content"].split(IMAGE_MARKER)
        return turns

    def _with_placeholders(self, pieces: list[str]) -> str:
        """Joins what stands around images by P placeholders each, and keeps the text's own ones apart."""
        token, run = self.placeholder, self.placeholder * self.tokens_per_image
        if any(run in piece for piece in pieces):
            raise ValueError(f"the text has {self.tokens_per_image} {token!r} in a row: that means an image")
        result = pieces[0]
        for left, right in itertools.pairwise(pieces):
            result += "\n" if left.endswith(token) else ""
            result += run + ("\n" if right.startswith(token) else "") + right
        return result

    def _encode(
        self, messages: list[dict], sanitize_control_tokens: bool = True, **options
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels. The template writes a mark where an answer goes; answers are tokenized apart,
        as first spaces would merge with the newline before. `literal` stands around control tokens."""
        tokenizer, texts = self.tokenizer, [turn["content"] for turn in messages]
        free = (char for char in map(chr, range(0xE000, 0x110000)) if not any(char in text for text in texts))
        answer, literal = next(free), next(free)
        quoted = rf"{literal}\g<0>{literal}" if sanitize_control_tokens else r"\g<0>"
        control, marked, learnt = control_tokens(tokenizer), [], []
        for turn in messages:
            pieces = turn.get("pieces", [turn["content"]])
            text = self._with_placeholders([control.sub(quoted, piece) for piece in pieces])
            if turn["role"] == "assistant":
                text = ""
                for begin, part, goes_on in self._answer(turn["content"]):
                    text += f"{begin}{answer}{len(learnt)}{answer}"
                    learnt.append((control.sub(quoted, part), goes_on))
            marked.append({"role": turn["role"], "content": text})
        options["chat_template"] = options.get("chat_template") or self.chat_template
        rendered = tokenizer.apply_chat_template(marked, tokenize=False, **options)
        input_ids, labels = [], []
        encode = self._plain_ids, tokenizer._encode_without_added_tokens
        for span, is_learnt in self._spans(rendered.split(answer), learnt):
            for i, text in enumerate(span.split(literal)):
                ids = self._ids(text, encode[i % 2])
                input_ids += ids
                labels += ids if is_learnt else [IGNORE_INDEX] * len(ids)
        return input_ids, labels

    def _ids(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Of text with placeholders. These take a tokenizer longer than all the rest, so that they are put in
        afterwards where its ids show that it is the same."""
        image, probe = [self.placeholder_id] * self.tokens_per_image, "a?  \n\n"
        run = self.placeholder * self.tokens_per_image
        if self.images_apart is None:
            around, whole = self._plain_ids(probe), self._plain_ids(probe + run + probe)
            self.images_apart = whole == around + image + around
        parts = text.split(run) if self.images_apart else [text]
        first, *rest = [encode(part) if part else [] for part in parts]
        return [*first, *itertools.chain.from_iterable(image + part for part in rest)]

    def _plain_ids(self, text: str) -> list[int]:
        """As `tokenizer.encode`, which takes twice as long."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # nor padding: what an earlier call may have asked for
        backend.no_padding()
        return backend.encode(text, add_special_tokens=False).ids

    def _answer(self, text: str) -> list[tuple[str, str, bool]]:
        """An assistant turn's parts, with what stands before each, and whether another follows: reasoning, if
        the tokenizer knows it, and the answer."""
        if (found := THINKING.fullmatch(text)) and "<think>" in self.tokenizer.added_tokens_encoder:
            return [("<think>\n", found[1], True), ("\n</think>\n\n", found[2], False)]
        return [("", text, False)]

    def _spans(self, pieces: list[str], learnt: list[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
        """Texts to tokenize apart, and whether they are learnt. Every second piece is a place in `learnt`."""
        header, end = re.escape(f"{self.tokenizer.bos_token}assistant\n"), re.escape(self.tokenizer.eos_token)
        around = re.compile(rf"((?:{end}\n?)?)(.*{header}|.*)(.*)", re.DOTALL)
        (part, goes_on), last = ("", False), len(pieces) - 1
        for i in range(0, len(pieces), 2):
            ended, between, begun = (pieces[i], "", "") if goes_on else around.fullmatch(pieces[i]).groups()
            yield from ((part + ended, i > 0), (between, False), (begun, i < last))  # begun: a think block
            part, goes_on = learnt[int(pieces[i + 1])] if i < last else ("", False)

    @staticmethod
    def _share_out(texts: list[str], images: Any) -> list[list]:
        if images is None:
            return [[] for _ in texts]
        if len(texts) == 1:
            return [_flat(images)]
        if isinstance(images, (list, tuple)) and all(isinstance(item, (list, tuple)) for item in images):
            return [list(item) for item in images]
        rest = iter(_flat(images))
        shares = [list(itertools.islice(rest, text.count(IMAGE_MARKER))) for text in texts]
        if leftover := len(list(rest)):
            raise ValueError(f"{leftover} more images than {IMAGE_MARKER} markers")
        return shares


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """Finds what the tokenizer would read as one of its added tokens; the longest where several fit."""
    return _any_of(tuple(token for token in tokenizer.added_tokens_encoder if not token.isspace()))


@cache
def _any_of(texts: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def image_slots(flat: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Images or features (sum of counts, ...), row after row -> (B, N, ...), zeros where a row has fewer.
    `counts` (B,) int64 says how many each row has; N is the largest of them."""
    slots = flat.new_zeros(len(counts), int(counts.max()), *flat.shape[1:])
    slots[torch.arange(slots.shape[1]) < counts[:, None]] = flat
    return slots


def _image_parts(messages: Sequence[dict]) -> list[dict]:
    parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
    return [part for part in parts if part.get("type") == "image"]


def _as_text(content: str | list[dict] | None) -> str:
    """A message's content as one string; image parts become `<image>`, each on a line of its own."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content or []:
        kind = part.get("type", "text")
        if kind not in ("image", "text"):
            raise ValueError(f"a message has a part of type {kind!r}, expected 'text' or 'image'")
        texts.append(IMAGE_MARKER if kind == "image" else part["text"])
    return "\n".join(texts)


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The options that `batch` takes; ValueError for any other that would change something."""
    given = {k: v for k, v in given.items() if v is not None and v not in NO_CHANGE.get(k, ())}
    for name in sorted(given.keys() - {"padding_side", "return_tensors"}):
        raise ValueError(f"the processor takes no {name}={given[name]!r}: it pads whole rows to the longest")
    return given


def _flat(images: Any) -> list:
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for item in images for image in _flat(item)]
