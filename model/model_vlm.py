"""MiniMindVLM: the language model, a frozen vision encoder, and one linear layer between them.

A text holds a run of placeholder ids for every image; `forward` puts projected patch features in their place.
Turning pictures and messages into tensors is `processing_vlm.py`'s work. Needs torch, transformers and PIL.
Shapes: B batch, T tokens, I image slots per row, P patches and N tokens per image, W the encoder's width,
C hidden size. With r = `pixel_shuffle`, a square of r x r patches is one token: N = P / r^2.
"""

import math
import re
from pathlib import Path

import torch
from PIL import Image
from torch import LongTensor, Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .model_minimind import MiniMindConfig, MiniMindForCausalLM, MiniMindOutput
from .pictures import first_line, to_rgb

# Compared by identity: an equal path that the caller wrote counts as given explicitly.
_DEFAULT_PATH = "./model/vision_model/clip-vit-base-patch16"
# `transformers serve` looks here for models that see; the library's own `register` does not write it.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["minimind-v"] = "MiniMindVLM"


class VLMConfig(MiniMindConfig):
    """The language model's config, the placeholder, and the encoder's own config: all there is to know.
    `image_ids` has an id for each token of an image; if not given, for as many as `vision_config` makes."""

    model_type = "minimind-v"
    sub_configs_defaults = {  # noqa: RUF012 (the library's class attribute)
        "vision_config": SubConfigSpec(AutoConfig, model_type="clip_vision_model", optional=True)
    }

    image_special_token: str | None = None
    image_ids: list[int] | None = None
    vision_config: dict | PreTrainedConfig | None = None
    projector: str = "linear"
    pixel_shuffle: int = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.projector not in PROJECTORS:
            raise ValueError(f"projector is {self.projector!r}, expected one of {', '.join(PROJECTORS)}")
        if self.pixel_shuffle < 1:
            raise ValueError(f"pixel_shuffle is {self.pixel_shuffle}, expected 1 or more")
        if self.image_ids is None:
            vision = self.vision_config
            self.image_ids = [34] * (token_count(vision, self.pixel_shuffle) if vision else 196)
        self.image_special_token = self.image_special_token or "@" * len(self.image_ids)
        if not self.image_ids or len(set(self.image_ids)) != 1:
            raise ValueError("image_ids must be one id, repeated for every token of an image")


class VisionProj(nn.Sequential):
    """One linear layer from the encoder's width to the language model's: (..., W) -> (..., C)."""

    def __init__(self, vision_size: int = 768, hidden_size: int = 512):
        super().__init__()
        self.vision_proj = nn.Sequential(nn.Linear(vision_size, hidden_size))


class MLPProj(nn.Sequential):
    """A norm and two linear layers, as release 3 has them: (..., W) -> (..., C)."""

    def __init__(self, vision_size: int = 768, hidden_size: int = 768):
        super().__init__()
        first, second = nn.Linear(vision_size, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(nn.LayerNorm(vision_size), first, nn.GELU(), second)


PROJECTORS = {"linear": VisionProj, "mlp": MLPProj}


class MiniMindVLM(MiniMindForCausalLM):
    config_class = VLMConfig

    def __init__(self, params: VLMConfig | None = None, vision_model_path: str | Path | None = _DEFAULT_PATH):
        """The encoder comes from an explicit `vision_model_path`, else from `params.vision_config` (its
        weights then from a state dict), else from the default path; None without `vision_config`: none."""
        super().__init__(params)
        self.params = self.config
        self.vision_encoder = self.processor = None
        is_given = vision_model_path is not None and vision_model_path is not _DEFAULT_PATH
        if not is_given and self.config.vision_config is not None:
            self.vision_encoder = AutoModel.from_config(self.config.vision_config)
        # from_pretrained builds on the meta device, where no file may be read.
        elif is_given or (vision_model_path and torch.get_default_device().type != "meta"):
            self.vision_encoder, self.processor = self.get_vision_model(vision_model_path)
        if self.vision_encoder is not None:
            self.config.vision_config = self.vision_encoder.config
        r = self.config.pixel_shuffle
        if self.processor is not None:  # it decides how large a picture is, and the config need not know
            tokens = token_count(self.config.vision_config, r, _blank_pixels(self.processor))
            token, ids = self.config.image_special_token, self.config.image_ids
            self.config.image_special_token = token[: len(token) // len(ids)] * tokens
            self.config.image_ids = ids[:1] * tokens
        self.vision_size = 768 if self.vision_encoder is None else self.vision_encoder.config.hidden_size
        self.vision_proj = PROJECTORS[self.config.projector](self.vision_size * r**2, self.config.hidden_size)
        self.post_init()
        self.train(self.training)

    @staticmethod
    def get_vision_model(model_path: str | Path) -> tuple[PreTrainedModel, object]:
        """The vision tower (fp32, frozen, eval mode) and the image processor of a transformers folder; a
        text tower beside it (CLIP, SigLIP) is left out, a pooler that it lacks becomes zeros. Raises
        FileNotFoundError for a missing folder, ValueError for one that holds something else, or through
        which a blank picture does not pass."""
        folder = Path(model_path)
        if not folder.is_dir():
            command = "`python scripts/download.py clip` (release 2) or `siglip2` (release 3)"
            raise FileNotFoundError(f"no vision encoder at {folder}: {command} gets a published one")
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # or each weight of the text tower is reported
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            config = getattr(config, "vision_config", None) or config
            patch_grid(config)
            encoder, report = AutoModel.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
            # Without a named backend the result depends on whether torchvision is installed.
            processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
            for name in sorted(report["missing_keys"]):
                if not re.search(r"pooler|^head\.", name):  # what follows the patches, and is not used here
                    raise ValueError(f"its weights lack {name}, ...")
                nn.init.zeros_(encoder.get_parameter(name))  # random ones would differ in every process
            MiniMindVLM.get_image_embeddings(_blank_pixels(processor), encoder.eval())
        except Exception as error:  # a damaged safetensors file has an exception type of its own
            raise ValueError(f"{folder} is not a usable vision encoder: {first_line(error)}") from error
        finally:
            logging.set_verbosity(verbosity)
        encoder.config.name_or_path = ""  # a path of this machine has no place in an exported config
        return encoder.requires_grad_(False), processor

    @staticmethod
    def image2tensor(image, processor) -> Tensor:
        """A PIL image of any mode -> (1, 3, H, W), as the encoder wants it."""
        return processor(images=to_rgb(image), return_tensors="pt")["pixel_values"]

    @staticmethod
    def get_image_embeddings(pixel_values: Tensor, vision_model: PreTrainedModel) -> Tensor:
        """Images (B, 3, H, W) -> the patches' last hidden states (B, P, W), without gradient. Always in the
        encoder's own dtype, whatever autocast surrounds the call: features computed during training and
        features stored before are then the same. To encode in bf16, convert the encoder."""
        with torch.no_grad(), torch.autocast(pixel_values.device.type, enabled=False):
            states = vision_model(pixel_values=pixel_values.to(vision_model.dtype)).last_hidden_state
        patches = math.prod(patch_grid(vision_model.config, pixel_values))
        registers = getattr(vision_model.config, "num_register_tokens", 0)
        if states.shape[1] not in (patches, patches + 1 + registers):
            found = f"the encoder gave {states.shape[1]} tokens for an image of {patches} patches"
            raise ValueError(f"{found}; only a class token and {registers} registers can be dropped")
        return states[:, -patches:]

    def train(self, mode: bool = True) -> "MiniMindVLM":
        super().train(mode)
        if self.vision_encoder is not None:
            # from_pretrained puts new parameters in place of the frozen ones, and ends with a call of eval().
            self.vision_encoder.requires_grad_(False).eval()
        return self

    def forward(
        self,
        input_ids: LongTensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
        pixel_values: Tensor | None = None,
        labels: LongTensor | None = None,
        image_features: Tensor | None = None,
        image_counts: LongTensor | None = None,
        position_ids: LongTensor | None = None,
        image_positions: LongTensor | None = None,
        picture_numbers: LongTensor | None = None,
        **args,
    ) -> MiniMindOutput:
        """As the language model's forward, with images, which are read only where the cache is empty. Without
        them nothing is replaced. ValueError where runs of placeholders and images disagree.

        `pixel_values` is (B, I, 3, H, W), or (B, 3, H, W) for one image a row, or (B, I, 1, 3, H, W);
        `image_counts` (B,) int64 says how many of a row's slots are real (absent: all); `image_features`
        (B, I, P, W) replaces `pixel_values` when features are computed already. With the flat
        `image_positions` (images * N,) that dataset/collate.py tells nothing is looked for or checked:
        `image_features` are (images, P, W), or `pixel_values` (pictures, 3, H, W), of which
        `picture_numbers` (images,) tells which an image is."""
        are_features = image_features is not None
        images = image_features if are_features else pixel_values
        if images is not None and (past_key_values is None or past_key_values.get_seq_length() == 0):
            if image_positions is None:
                if not are_features:
                    images = images.squeeze(2) if images.dim() == 6 else images
                    images = images.unsqueeze(1) if images.dim() == 4 else images
                layout = "(B, I, P, W)" if are_features else "(B, I, 3, H, W)"
                images, counts = real_slots(images, layout, image_counts)
                image_positions = self._image_positions(input_ids, counts)
            features = images if are_features else self._encode(images)
            if picture_numbers is not None:
                features = features.index_select(0, picture_numbers)
            embedded = self.model.embed(input_ids)
            args["inputs_embeds"] = self._insert_features(embedded, features, image_positions)
        args |= {"labels": labels, "position_ids": position_ids}
        return super().forward(input_ids, attention_mask, past_key_values, use_cache, logits_to_keep, **args)

    def count_vision_proj(
        self, tokens: LongTensor, h: Tensor, vision_tensors: Tensor | None = None, seqlen: int = 512
    ) -> Tensor:
        """`h` (B, T, C) with the placeholder runs of `tokens` (B, T) replaced by projected `vision_tensors`
        (B, I, P, W). `seqlen` belongs to the published signature; the length never changes here."""
        if vision_tensors is None:
            return h
        features, counts = real_slots(vision_tensors, "(B, I, P, W)", None)
        return self._insert_features(h, features, self._image_positions(tokens, counts))

    def _encode(self, images: Tensor) -> Tensor:
        """Encoder outputs (images, P, W) of images (images, 3, H, W)."""
        if self.vision_encoder is None:
            raise ValueError("pixel_values were given, but this model was built without a vision encoder")
        if len(images) == 0:
            config = self.vision_encoder.config
            return images.new_zeros(0, math.prod(patch_grid(config, images)), config.hidden_size)
        return self.get_image_embeddings(images, self.vision_encoder)

    def _insert_features(self, embedded: Tensor, features: Tensor, positions: LongTensor) -> Tensor:
        """`embedded` (B, T, C) with projected features (images, P, W) at flat `positions` (images * N,)."""
        r = self.config.pixel_shuffle
        found, expected = features.shape[1:], (len(self.config.image_ids) * r**2, self.vision_size)
        if found != expected:
            raise ValueError(f"image features have shape {tuple(found)}, expected {expected}")
        shuffled = pixel_shuffled(features, r, self.config.vision_config)  # (images, N, r^2 W)
        # Not the dtype of the projection's weights: quantized ones are integers.
        projected = self.vision_proj(shuffled.to(embedded.dtype)).to(embedded)  # (images, N, C)
        # Not in place: dropout and embedding need their outputs in the backward pass.
        return embedded.flatten(0, 1).index_copy(0, positions, projected.flatten(0, 1)).view_as(embedded)

    def _image_positions(self, input_ids: LongTensor, image_counts: LongTensor) -> Tensor:
        """Flat positions (images * N,) of what images replace: a run of n * N placeholders takes n images."""
        tokens = len(self.config.image_ids)
        placeholder = input_ids == self.config.image_ids[0]  # (B, T)
        starts = placeholder & ~nn.functional.pad(placeholder, (1, 0))[:, :-1]  # (B, T)
        rows = starts.nonzero()[:, 0]  # (runs,), row after row
        run_of_token = starts.flatten().cumsum(0)[placeholder.flatten()] - 1  # (placeholders,)
        lengths = run_of_token.bincount()  # (runs,)
        images = lengths // tokens  # 0 for a shorter run: that is text
        broken = (lengths > tokens) & (lengths % tokens != 0)
        found = torch.zeros_like(image_counts).index_add_(0, rows, images)  # (B,)
        if bool(broken.any() | (found != image_counts).any()):
            if broken.any():
                run = f"row {rows[broken][0].item()}: a run of {lengths[broken][0].item()} image placeholders"
                raise ValueError(f"{run} is not a multiple of {tokens}")
            row = (found != image_counts).nonzero()[0].item()
            runs = f"{found[row].item()} runs of {tokens} image placeholders"
            raise ValueError(f"row {row}: {runs}, but {image_counts[row].item()} images")
        return placeholder.flatten().nonzero().squeeze(1)[images[run_of_token] > 0]

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if not kwargs.get("is_first_iteration") and kwargs.get("use_cache", True):
            for name in ("pixel_values", "image_features", "image_counts"):  # they are in the cache
                inputs.pop(name, None)
        return inputs


def real_slots(images: Tensor, layout: str, counts: LongTensor | None) -> tuple[Tensor, LongTensor]:
    """Of `images` (B, I, ...) in that `layout` the real ones, row after row (images, ...), and how many each
    row has (B,): its first `counts`, by default all. ValueError for what does not fit."""
    if images.dim() != layout.count(",") + 1:
        raise ValueError(f"images have shape {tuple(images.shape)}, expected {layout}")
    rows, slots = images.shape[:2]
    counts = torch.full((rows,), slots, device=images.device) if counts is None else counts.to(images.device)
    if counts.shape != (rows,):
        raise ValueError(f"image_counts has shape {tuple(counts.shape)}, expected ({rows},)")
    if bool(((counts < 0) | (counts > slots)).any()):
        given = f"image_counts {counts.tolist()}"
        raise ValueError(f"{given} must lie between 0 and the {slots} slots of a row")
    return images[torch.arange(slots, device=images.device) < counts[:, None]], counts


def pixel_shuffled(features: Tensor, r: int, vision_config: PreTrainedConfig | None) -> Tensor:
    """Patches (images, P, W) -> tokens (images, N, r^2 W): squares of r x r neighbouring patches, row by row
    inside a square and over the grid, which has the config's shape, if not its size; else it is square."""
    if r == 1:
        return features
    rows, columns = patch_grid(vision_config) if vision_config else (1, 1)
    rows = math.isqrt(features.shape[1] * rows // columns)
    squares = features.unflatten(1, (rows // r, r, -1, r)).transpose(2, 3)
    return squares.flatten(3).flatten(1, 2)  # from (images, rows / r, columns / r, r, r, W)


def token_count(vision_config: PreTrainedConfig, r: int, pixel_values: Tensor | None = None) -> int:
    """N, for pictures as `patch_grid` has them. ValueError where `pixel_shuffled` cannot make squares."""
    (rows, columns), (height, width) = patch_grid(vision_config, pixel_values), patch_grid(vision_config)
    if r > 1 and (rows % r or columns % r or rows * width != columns * height):
        expected = f"expected one of its config's shape, with sides that {r} divides"
        raise ValueError(f"pixel_shuffle {r}: found a grid of {rows} x {columns} patches, {expected}")
    return rows * columns // r**2


def patch_grid(vision_config: PreTrainedConfig, pixel_values: Tensor | None = None) -> tuple[int, int]:
    """Rows and columns of an image's patches: by `pixel_values` (B, 3, H, W), else by the config's size.
    ValueError for a config that knows no patches."""
    sizes = [getattr(vision_config, name, None) for name in ("image_size", "patch_size")]
    if None in sizes or not hasattr(vision_config, "hidden_size"):
        raise ValueError(f"a {vision_config.model_type!r} config has no image_size and patch_size")
    if pixel_values is not None:
        sizes[0] = pixel_values.shape[-2:]
    sizes = [size if isinstance(size, (list, tuple)) else (size, size) for size in sizes]
    return tuple(size // patch for size, patch in zip(*sizes, strict=True))


def _blank_pixels(processor) -> Tensor:
    """A blank picture, preprocessed: (1, 3, H, W). ValueError if a wide and a high one become unlike."""
    blanks = (Image.new("RGB", size) for size in ((64, 48), (48, 64)))
    wide, high = (MiniMindVLM.image2tensor(blank, processor) for blank in blanks)
    if wide.shape != high.shape:
        sizes = f"{tuple(wide.shape[1:])} and {tuple(high.shape[1:])}"
        raise ValueError(f"its preprocessing makes pictures of {sizes}, expected one size for all")
    return wide


def load_weights(
    model: MiniMindForCausalLM, state_dict: dict[str, Tensor], allow_missing: tuple[str, ...] = ()
) -> None:
    """Copies a state dict into the model, in the model's dtype; what does not fit is named in a ValueError.
    No error: an encoder on one side only, masks and `pos_cis` tables of old files, one of two tied weights,
    and missing keys that start with one of `allow_missing` (`("vision_proj.",)` starts a VLM from an LM)."""
    found = {key: value for key, value in state_dict.items() if "mask" not in key and "pos_cis" not in key}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if model.config.tie_word_embeddings and (head in found) != (embedding in found):
        found[head] = found[embedding] = found.get(head, found.get(embedding))
    expected = model.state_dict()
    if not all(any(key.startswith("vision_encoder.") for key in keys) for keys in (found, expected)):
        found, expected = without_encoder(found), without_encoder(expected)
    lacking = (key for key in expected.keys() - found.keys() if not key.startswith(allow_missing))
    both = ((key, tuple(found[key].shape), tuple(expected[key].shape)) for key in expected.keys() & found)
    problems = [f"{key} is missing" for key in lacking]
    problems += [f"{key} is unexpected" for key in found.keys() - expected.keys()]
    problems += [f"{key} has shape {has}, expected {wants}" for key, has, wants in both if has != wants]
    if problems:
        problems.sort()
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"the weights do not fit the model: {'; '.join(problems[:8])}{more}")
    model.load_state_dict(found, strict=False)


def without_encoder(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is stored of a model: the encoder never changes."""
    return {key: value for key, value in state_dict.items() if not key.startswith("vision_encoder.")}
