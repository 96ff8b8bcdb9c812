"""The published release's way of doing what the model does, for benchmark.py to compare with.

Shapes: B batch, T tokens, S tokens seen, C hidden size, H heads, D head size.
"""

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F

import dataset.collate
import model.model_minimind as minimind
from model.model_vlm import MiniMindVLM


@contextlib.contextmanager
def working_as_published(length: int) -> Iterator[None]:
    """Inside, the models of this process attend and norm step by step, their experts take turns, and rows
    are padded to `length` tokens."""
    ours = dataset.collate.collate

    def padded(rows: list, pad: int, pack: int | None, multiple: int, tokens_per_image: int) -> dict:
        return ours(rows, pad, pack, length, tokens_per_image)

    with (
        mock.patch.object(minimind.Attention, "forward", attention_step_by_step),
        mock.patch.object(minimind, "signed", lambda sin: sin),
        mock.patch.object(minimind.RMSNorm, "forward", norm_step_by_step),
        mock.patch.object(minimind.MoE, "_routed", experts_one_by_one),
        mock.patch.object(dataset.collate, "collate", padded),
    ):
        yield


class PublishedVLM(MiniMindVLM):
    def forward(self, label_positions, label_ids, num_items_in_batch, skip_logits=False, **inputs):
        """Logits and losses of all positions, whether or not they count."""
        output = super().forward(**inputs)
        logits = output.logits.flatten(0, 1)  # (B * T, V)
        targets = torch.full_like(logits[:, 0], -100, dtype=torch.long)  # (B * T,)
        targets[label_positions] = label_ids
        losses = F.cross_entropy(logits, targets.clamp(min=0), reduction="none")  # (B * T,)
        output.loss = (losses * (targets != -100)).sum() / num_items_in_batch
        return output


def attention_step_by_step(self, hidden, rope, mask, past_key_values, output_attentions):
    B, T, C = hidden.shape
    query, key, value = (
        projection(hidden).view(B, T, -1, self.head_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    query, key = rotate_half(self.q_norm(query), *rope), rotate_half(self.k_norm(key), *rope)
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_index)
    key, value = key.repeat_interleave(self.groups, 1), value.repeat_interleave(self.groups, 1)
    if hidden.is_cuda and T > 1:  # there its `flash_attn` pays
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.resid_dropout(self.o_proj(output.transpose(1, 2).reshape(B, T, C))), None
    scores = query @ key.transpose(-2, -1) / math.sqrt(self.head_dim)  # (B, H, T, S)
    S = key.shape[2]
    scores = scores + torch.full((T, S), -math.inf, device=hidden.device).triu(S - T + 1)
    output = scores.softmax(-1) @ value  # (B, H, T, D)
    return self.resid_dropout(self.o_proj(output.transpose(1, 2).reshape(B, T, C))), None


def rotate_half(states, cos, sin):
    first, second = states.chunk(2, dim=-1)
    return (states * cos + torch.cat((-second, first), dim=-1) * sin).type_as(states)


def norm_step_by_step(self, hidden):
    states = hidden.float()
    states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps)
    return self.weight * states.type_as(hidden)


def experts_one_by_one(self, tokens, choices, weights, chosen):
    k = choices.shape[1]
    repeated, numbers = tokens.repeat_interleave(k, dim=0), choices.flatten()
    output = torch.zeros_like(repeated)
    for number, expert in enumerate(self.experts):
        output[numbers == number] = expert(repeated[numbers == number]).to(output.dtype)
    return (output.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)
