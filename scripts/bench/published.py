"""The published release's way of doing what the model does, for benchmark.py to compare with.

Shapes: B batch, T tokens, S tokens seen, C hidden size, H heads, D head size.
"""

import math

import torch
import torch.nn.functional as F

import model.model_minimind as minimind
from model.model_vlm import MiniMindVLM


def work_as_published() -> None:
    """From now on the models of this process attend step by step, and their experts take turns."""
    minimind.Attention.forward = attention_step_by_step
    minimind.MoE._routed = experts_one_by_one


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
        projection(hidden).view(B, T, -1, self.head_dim).transpose(1, 2)
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    query, key = minimind.rotate(query, *rope), minimind.rotate(key, *rope)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_index)
    key, value = key.repeat_interleave(self.groups, 1), value.repeat_interleave(self.groups, 1)
    scores = query @ key.transpose(-2, -1) / math.sqrt(self.head_dim)  # (B, H, T, S)
    S = key.shape[2]
    scores = scores + torch.full((T, S), -math.inf, device=hidden.device).triu(S - T + 1)
    output = scores.softmax(-1) @ value  # (B, H, T, D)
    return self.resid_dropout(self.o_proj(output.transpose(1, 2).reshape(B, T, C))), None


def experts_one_by_one(self, tokens, choices, weights):
    k = choices.shape[1]
    repeated, chosen = tokens.repeat_interleave(k, dim=0), choices.flatten()
    output = torch.zeros_like(repeated)
    for number, expert in enumerate(self.experts):
        output[chosen == number] = expert(repeated[chosen == number])
    return (output.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)
