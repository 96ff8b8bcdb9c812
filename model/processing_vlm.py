"""Pictures and messages -> what MiniMindVLM reads; the only place that builds a prompt.

Training, evaluation, the web demo and exported folders all use MiniMindVLMProcessor. The chat format itself
is the tokenizer's chat template; here `<image>` becomes placeholders, and answers get labels.
Shapes: B rows, N most images of a row, P placeholder tokens per image, T tokens.
"""

import base64
import contextlib
import functools
import io
import itertools
import os
import re
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import to_numpy_array
from transformers.processing_utils import ProcessorMixin

IMAGE_MARKER = "<image>"
PLACEHOLDER = "@"
IGNORE_INDEX = -100
ROLES = ("system", "user", "assistant")
# Only these: Pillow goes by content, and would hand a PostScript file of any name to Ghostscript.
Image.init()
FORMATS = [name for name in "PNG JPEG WEBP GIF BMP TIFF AVIF JPEG2000".split() if name in Image.OPEN]
OVERSAMPLING = 4  # times the encoder's size: what a shorter side is left when a large picture shrinks
MAX_ASPECT = 100  # an encoder scales the shorter side: a line of one pixel would fill the memory


class MiniMindVLMProcessor(ProcessorMixin):
    """Joins an image processor and the tokenizer.

    `tokens_per_image` is P, the encoder's patch tokens: 196 for CLIP-ViT-B/16 at 224 pixels.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, tokens_per_image: int = 196):
        self.tokens_per_image = tokens_per_image
        self.image_token = IMAGE_MARKER
        chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        if image_processor is None:  # the text stage; the library insists on both parts
            self.image_processor, self.tokenizer, self.chat_template = None, tokenizer, chat_template
        else:
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As transformers has it, with the same image processor whether or not torchvision is installed."""
        return super().from_pretrained(pretrained_model_name_or_path, **{"backend": "pil", **kwargs})

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_counts"]

    @property
    def placeholder_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(PLACEHOLDER)

    @property
    def image_size(self) -> int | None:
        """The pixels of the shorter side that preprocessing scales pictures to; None if it scales none."""
        settings = self.image_processor
        scaled = getattr(settings, "do_resize", False) and getattr(settings, "size", None)
        return max(dict(scaled).values()) if scaled else None

    def encode_chat(self, messages: Sequence[dict], num_images: int = 0) -> tuple[list[int], list[int]]:
        """Token ids and labels of a whole conversation, for training.

        Labels are unshifted: an assistant turn's content, its `<|im_end|>` and the newline; -100 elsewhere.
        ValueError for an unknown role, a blank assistant turn, or `<image>` markers that differ from
        `num_images`.
        """
        messages = self._expand(messages, num_images)
        if any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
            raise ValueError("an assistant turn is empty")
        return self._encode(messages)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text between a turn's control tokens; ValueError if it looks like an image."""
        text = self._with_placeholders(text, expand=False)
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
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
        return_tensors: str | None = "auto",
        **kwargs,
    ):
        """As transformers has it, but text such as `<|im_start|>` inside a message stays text by default.

        Pictures come inside the messages (`{"type": "image", "path": ...}`), or in
        `processor_kwargs["images"]`, a list for each conversation; with `tokenize=True, return_dict=True` the
        result feeds `generate`.
        """
        if not tokenize:
            return super().apply_chat_template(
                conversation,
                chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **kwargs,
            )
        conversations, is_batched = self._normalize_conversations(conversation)
        images = [self._pictures_inside(messages) for messages in conversations]
        options = {**kwargs, **(processor_kwargs or {})}
        if (given := options.pop("images", None)) is not None:
            images = given if is_batched else [given]
        rows = [
            self._encode(
                self._expand(messages, len(pictures)),
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                sanitize_control_tokens=sanitize_control_tokens,
            )[0]
            for messages, pictures in zip(conversations, images, strict=True)
        ]
        if not return_dict:
            return rows if is_batched else rows[0]
        return self.batch(rows, images, padding_side=options.get("padding_side", "left"))

    def __call__(self, images=None, text=None, padding_side: str | None = None, **kwargs) -> BatchFeature:
        """Prompts that are already text, with `<image>` where pictures go.

        `images`: for one text a picture or a list; for several texts a list of pictures for each, or a flat
        list that the texts' markers share out. Without `text`, only `pixel_values` of the pictures.
        ValueError where markers and pictures differ in number. Other arguments of the library are accepted
        and have no effect: rows are always padded to the longest one and returned as tensors.
        """
        if text is None:
            return BatchFeature({"pixel_values": self.pixel_values(_flat(images))})
        texts = [text] if isinstance(text, str) else list(text)
        pictures = self._share_out(texts, images)
        rows = []
        for row, (prompt, row_pictures) in enumerate(zip(texts, pictures, strict=True)):
            found = prompt.count(IMAGE_MARKER)
            if found != len(row_pictures):
                raise ValueError(
                    f"text {row}: {found} {IMAGE_MARKER} markers, but {len(row_pictures)} images"
                )
            rows.append(self.tokenizer.encode(self._with_placeholders(prompt), add_special_tokens=False))
        return self.batch(rows, pictures, padding_side=padding_side or self.tokenizer.padding_side)

    def batch(self, rows: list[list[int]], images: list[list], padding_side: str = "left") -> BatchFeature:
        """Pads `rows` to the longest: input_ids, attention_mask (B, T) and, if there are any pictures,
        pixel_values (B, N, 3, H, W) with image_counts (B,)."""
        length = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)  # (B, T)
        attention_mask = torch.zeros_like(input_ids)  # (B, T)
        for i, row in enumerate(rows):
            where = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
            input_ids[i, where] = torch.tensor(row)
            attention_mask[i, where] = 1
        data = {"input_ids": input_ids, "attention_mask": attention_mask}
        counts = torch.tensor([len(pictures) for pictures in images])
        if counts.sum():
            flat = self.pixel_values(_flat(images))  # (sum of counts, 3, H, W)
            data |= {"pixel_values": image_slots(flat, counts), "image_counts": counts}  # (B, N, 3, H, W)
        return BatchFeature(data)

    def pixel_values(self, images: list) -> torch.Tensor:
        """Preprocessed (len(images), 3, H, W), fp32. A picture is a PIL image, a path, a URL, base64, or an
        array as `from_array` takes it. ValueError names what cannot be read."""
        images = [self._rgb(image) for image in images]
        return self.image_processor(images, return_tensors="pt")["pixel_values"]

    def _rgb(self, image: Any) -> Image.Image:
        if isinstance(image, (str, Path)):
            short = str(image) if len(str(image)) <= 200 else f"{image[:40]}..."  # base64
            source = functools.partial(_load, str(image))
            with open_picture(source, f"cannot read image {short}", self.image_size) as opened:
                return to_rgb(opened, self.image_size)
        return to_rgb(image if isinstance(image, Image.Image) else from_array(image), self.image_size)

    def _expand(self, messages: Sequence[dict], num_images: int) -> list[dict[str, str]]:
        """Messages with plain string contents, `<image>` of user turns replaced by placeholders; it is text
        where there are no images."""
        parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
        pictured = num_images > 0 or any(part.get("type") == "image" for part in parts)
        turns = [{"role": m["role"], "content": _as_text(m.get("content"))} for m in messages]
        for number, turn in enumerate(turns, start=1):
            if turn["role"] not in ROLES:
                raise ValueError(
                    f"turn {number}: unknown role {turn['role']!r}, expected one of {', '.join(ROLES)}"
                )
            if turn["role"] == "assistant":
                # The generation prompt ends in a newline of its own, so an answer never starts with one.
                turn["content"] = turn["content"].lstrip("\n")
        users = [turn for turn in turns if turn["role"] == "user"]
        found = sum(turn["content"].count(IMAGE_MARKER) for turn in users) if pictured else 0
        if num_images and not found and users:
            users[0]["content"] = f"{IMAGE_MARKER}\n" * num_images + users[0]["content"]
            found = num_images
        if found != num_images:
            raise ValueError(f"{found} {IMAGE_MARKER} markers in the user's turns, but {num_images} images")
        for turn in turns:
            expand = pictured and turn["role"] == "user"
            turn["content"] = self._with_placeholders(turn["content"], expand)
        return turns

    def _with_placeholders(self, text: str, expand: bool = True) -> str:
        """Replaces each `<image>` by P placeholders and keeps the text's own `@` apart from them."""
        pieces = text.split(IMAGE_MARKER) if expand else [text]
        for piece in pieces:
            if PLACEHOLDER * self.tokens_per_image in piece:
                raise ValueError(
                    f"the text has {self.tokens_per_image} {PLACEHOLDER!r} in a row: that means an image"
                )
        result = pieces[0]
        for left, right in itertools.pairwise(pieces):
            result += "\n" if left.endswith(PLACEHOLDER) else ""
            result += PLACEHOLDER * self.tokens_per_image
            result += ("\n" if right.startswith(PLACEHOLDER) else "") + right
        return result

    def _encode(
        self, messages: list[dict[str, str]], sanitize_control_tokens: bool = True, **options
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels. The template writes a mark where an answer goes; answers are tokenized apart,
        as first spaces would merge with the newline before. `literal` stands around control tokens."""
        tokenizer, texts = self.tokenizer, [turn["content"] for turn in messages]
        free = (char for char in map(chr, range(0xE000, 0x110000)) if not any(char in text for text in texts))
        answer, literal = next(free), next(free)
        if sanitize_control_tokens:
            texts = [control_tokens(tokenizer).sub(rf"{literal}\g<0>{literal}", text) for text in texts]
        marked = [
            {"role": turn["role"], "content": f"{answer}{i}{answer}" if turn["role"] == "assistant" else text}
            for i, (turn, text) in enumerate(zip(messages, texts, strict=True))
        ]
        options["chat_template"] = options.get("chat_template") or self.chat_template
        rendered = tokenizer.apply_chat_template(marked, tokenize=False, **options)
        input_ids, labels = [], []
        for span, learnt in self._spans(rendered.split(answer), texts):
            for i, text in enumerate(span.split(literal)):
                encode = tokenizer._encode_without_added_tokens if i % 2 else tokenizer.encode
                ids = encode(text) if i % 2 else encode(text, add_special_tokens=False)
                input_ids += ids
                labels += ids if learnt else [IGNORE_INDEX] * len(ids)
        return input_ids, labels

    def _spans(self, pieces: list[str], texts: list[str]) -> Iterator[tuple[str, bool]]:
        """Texts to be tokenized apart, and whether they are learnt. Every second piece is an answer's number
        in `texts`."""
        header, end = re.escape(f"{self.tokenizer.bos_token}assistant\n"), re.escape(self.tokenizer.eos_token)
        around = re.compile(rf"((?:{end}\n?)?)(.*{header}|.*)(.*)", re.DOTALL)
        for i, piece in enumerate(pieces):
            if i % 2:
                yield texts[int(piece)], True
                continue
            ended, between, begun = around.fullmatch(piece).groups()  # begun: a think block, say
            yield from ((ended, i > 0), (between, False), (begun, i < len(pieces) - 1))

    @staticmethod
    def _pictures_inside(messages: Sequence[dict]) -> list:
        parts = [p for m in messages if isinstance(m.get("content"), list) for p in m["content"]]
        keys = ("image", "url", "path", "base64")
        return [part[key] for part in parts if part.get("type") == "image" for key in keys if key in part]

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
    tokens = (token for token in tokenizer.added_tokens_encoder if not token.isspace())
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


@contextlib.contextmanager
def open_picture(
    source: str | Callable, where: str, image_size: int | None = None, kind: type[ValueError] = ValueError
) -> Iterator[Image.Image]:
    """The picture in a file, or in what `source()` gives, not decoded yet; with `image_size` a JPEG's decoder
    may shrink it. For whatever is wrong with it, inside the block too, an error of type `kind`
    in one line that begins with `where`: Pillow's decoders raise whatever comes up in a broken file."""
    try:
        with Image.open(source() if callable(source) else source, formats=FORMATS) as image:
            width, height = image.size
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"{width} x {height} pixels, one side over {MAX_ASPECT} times the other")
            if image_size:
                image.draft(None, (OVERSAMPLING * image_size,) * 2)
            yield image
    except Exception as error:
        unknown = f"not a picture, expected {', '.join(FORMATS)}"
        found = unknown if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise kind(f"{where} ({found})") from None


def to_rgb(image: Image.Image, image_size: int | None = None) -> Image.Image:
    """Any picture of PIL as upright RGB with 8 bits a channel, what is transparent laid on white.

    One that is far too large for `image_size`, the encoder's, shrinks by a whole factor.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    factor = min(image.size) // (OVERSAMPLING * image_size) if image_size else 1
    return image.reduce(factor) if factor > 1 else image


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey by the range of 16 bits; 32-bit integers and floats by the picture's own, where NaN is the
    darkest and a picture of one value black."""
    values = to_numpy_array(image).astype("float64")  # (H, W)
    finite = values[abs(values) < float("inf")]
    lowest, highest = (finite.min(), finite.max()) if finite.size else (0, 0)
    if image.mode.startswith("I;16"):
        lowest, highest = 0, 65535
    transparent = values == image.info.get("transparency")
    values[values != values] = lowest
    grey = (values.clip(lowest, highest) - lowest) * (255 / ((highest - lowest) or 1))
    grey[transparent] = 255
    return Image.fromarray(grey.round().astype("uint8"))


def from_array(image: Any) -> Image.Image:
    """An array or tensor (H, W), (H, W, C) or (C, H, W) as a picture: floats and truth values from 0 to 1,
    uint16 from 0 to 65535, other integers from 0 to 255. ValueError for any other."""
    pixels = to_numpy_array(image)
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    kind = pixels.dtype.str[1:]  # without the order of bytes
    most = 1 if kind[0] in "fb" else 65535 if kind == "u2" else 255
    fits = pixels.size > 0 and pixels.ndim in (2, 3) and pixels.shape[2:] in ((), (1,), (3,), (4,))
    if not (fits and 0 <= pixels.min() <= pixels.max() <= most):  # NaN is neither
        values = f", {pixels.min():g} to {pixels.max():g}," if fits else ""
        found = f"an array {pixels.shape} of {pixels.dtype}{values}"
        raise ValueError(f"{found} is no picture: expected (H, W) or (H, W, 3), 0 to {most}")
    pixels = (pixels * (255 / most)).round().astype("uint8")
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def _load(source: str) -> str | io.BytesIO:
    """A path as it is; what a URL or base64 holds as a stream."""
    if source.startswith(("http://", "https://", "data:image/")):
        with urllib.request.urlopen(source, timeout=60) as answer:
            return io.BytesIO(answer.read())
    with contextlib.suppress(ValueError):  # no base64: a path of nothing
        if not os.path.isfile(source):  # noqa: PTH113 (pathlib's raises for a long name)
            return io.BytesIO(base64.b64decode("".join(source.split()), validate=True))
    return source


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def image_slots(flat: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Images or features (sum of counts, ...), row after row -> (B, N, ...), zeros where a row has fewer.

    `counts` (B,) int64 says how many each row has; N is the largest of them.
    """
    slots = flat.new_zeros(len(counts), int(counts.max()), *flat.shape[1:])
    slots[torch.arange(slots.shape[1]) < counts[:, None]] = flat
    return slots


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


def _flat(images: Any) -> list:
    if not isinstance(images, (list, tuple)):
        return [images]
    return [
        image for item in images for image in (_flat(item) if isinstance(item, (list, tuple)) else [item])
    ]
