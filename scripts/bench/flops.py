"""Floating-point operations that the samples of a training step need, from the shapes of the model's layers.

By formula, not by torch's counter: that one knows no grouped products and, up to torch 2.11, no attention of
grouped heads; on a CPU it leaves attention out without a word.
"""

import re

from torch import nn

from model.model_vlm import MiniMindVLM, patch_grid


def step_flops(model: MiniMindVLM, rows: int, tokens: int, supervised: int, encodes: bool = True) -> float:
    """Matrix products alone, of `rows` rows of equal length that show a picture each and have so many
    `tokens` and `supervised` ones together; without padding, recomputation, or an encoder that does not work.

    For each token that passes a weight, 2 operations forward, 2 for the gradient that flows back through it,
    2 for its own if it learns: 6 for a weight that learns, 4 for a frozen one, as the projection at the
    bottom always learns, and 2 in the encoder, where nothing flows back (Kaplan et al., arXiv:2001.08361,
    2.1). Attention: scores and their weighted sum, 2 for each pair of tokens and channel; under a causal mask
    half of the pairs; backward, twice that (Chowdhery et al., arXiv:2204.02311, appendix B, counts masked
    pairs too).
    """
    config, vision = model.config, model.config.vision_config
    rows_patches, columns_patches = patch_grid(vision)
    patches = rows_patches * columns_patches  # but for a class token
    last = config.num_hidden_layers - 1
    routed = tokens * config.num_experts_per_tok / config.n_routed_experts  # by an expert, on average
    seen = {  # which tokens pass the weights of this name; the first that fits
        r"vision_encoder\..*(\.layers\.|patch_embedding)": rows * patches if encodes else 0,
        r"vision_encoder\.": 0,  # a pooling head
        r"vision_proj\.": rows * len(config.image_ids),
        r"lm_head": supervised,
        rf"model\.layers\.{last}\.mlp\.(gate|up|down)_proj": supervised,
        r"model\.layers\.\d+\.mlp\.experts\.": routed,
        r"model\.layers\.": tokens,
    }
    total, bottom = 0.0, config.projector == "linear"  # the other begins with a norm that learns
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        passing = next(count for pattern, count in seen.items() if re.match(pattern, name))
        ways = 1
        if not name.startswith("vision_encoder."):
            flows_back = not (bottom and name.startswith("vision_proj."))
            bottom = bottom and flows_back
            ways += flows_back + module.weight.requires_grad
        total += 2 * ways * module.weight.numel() * passing
    width = config.num_attention_heads * config.head_dim
    total += 3 * 2 * width * config.num_hidden_layers * tokens * tokens / rows
    if encodes:
        total += 4 * vision.hidden_size * vision.num_hidden_layers * rows * patches**2
    return total
