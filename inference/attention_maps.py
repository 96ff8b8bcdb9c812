"""Where an answer looked: how much each of its tokens attended to each patch of each picture.

The prompt is read once more, then the finished answer at once, with the weights of its tokens alone.
Shapes: T prompt tokens, N new tokens, I images, P tokens per image, H heads.
"""

import torch
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
    seen = {name: inputs[name] for name in ("image_features", "image_counts")}
    prompt = model(input_ids[:, :-1], **seen, use_cache=True, logits_to_keep=1)
    choosing = torch.cat([input_ids[:, -1:], new_ids[None, :-1].to(input_ids)], dim=1)  # (1, N)
    answer = model(choosing, past_key_values=prompt.past_key_values, output_attentions=True)
    weights = torch.cat(answer.attentions)[..., : input_ids.shape[1]]  # (L, H, N, T)
    patches = model._image_positions(input_ids, inputs["image_counts"])  # (images * P,)
    return weights.float().mean((0, 1))[:, patches].view(tokens, -1, per_image)
