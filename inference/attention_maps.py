"""Where an answer looked: how much each of its tokens attended to each patch of each picture.

The model's attention gives no weights, so one forward pass over the finished answer is watched.
Shapes: T prompt tokens, N new tokens, I images, P tokens per image, H heads, D head size.
"""

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import BatchFeature

from model.model_vlm import MiniMindVLM


@torch.no_grad()
def attention_to_patches(model: MiniMindVLM, inputs: BatchFeature, new_ids: torch.Tensor) -> torch.Tensor:
    """Attention weights (N, I, P) in fp32 on the model's device; what a row lacks to 1 went to text.

    `inputs` are `inference.answers.prepare`'s for one prompt, `new_ids` (N,) what was generated after it;
    row n belongs to the position that chose token n. The mean over all heads and layers: pictures are read
    in every layer, and least in the last (16% of its attention in the demo, 41% over all).

    Raises:
        ValueError: several prompts, or a padded one.
    """
    input_ids = inputs["input_ids"]  # (1, T)
    if len(input_ids) != 1 or not bool(inputs["attention_mask"].all()):
        raise ValueError(f"expected one prompt without padding, found {tuple(input_ids.shape)}")
    tokens, per_image = len(new_ids), len(model.config.image_ids)
    if "image_counts" not in inputs or tokens == 0:
        images = inputs["image_features"].shape[1] if "image_features" in inputs else 0
        return torch.zeros(tokens, images, per_image, device=input_ids.device)
    whole = torch.cat([input_ids, new_ids[None, :-1].to(input_ids)], dim=1)  # (1, T + N - 1)
    patches = model._image_positions(input_ids, inputs["image_counts"])[0].nonzero()[:, 0]  # (I * P,)
    with _Watched(tokens, patches) as watched:
        model(whole, image_features=inputs["image_features"], image_counts=inputs["image_counts"])
    return torch.stack(watched.layers).mean(0).view(tokens, -1, per_image)


class _Watched(TorchFunctionMode):
    """Keeps, for each attention of this thread, the mean over heads of the last `tokens` rows' weights at
    the keys `patches`, (N, I * P)."""

    def __init__(self, tokens: int, patches: torch.Tensor) -> None:
        super().__init__()
        self.tokens, self.patches = tokens, patches
        self.layers: list[torch.Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.layers.append(self._weights(*args[:2]))
        return function(*args, **(kwargs or {}))

    def _weights(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        length = key.shape[2]
        query = query[0, :, -self.tokens :].float()  # (H, N, D)
        key = key[0].float().repeat_interleave(len(query) // key.shape[1], 0)  # (H, T + N - 1, D)
        with torch.autocast(query.device.type, enabled=False):
            scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5  # (H, N, T + N - 1)
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(length - self.tokens + 1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return weights[:, :, self.patches].mean(0)
