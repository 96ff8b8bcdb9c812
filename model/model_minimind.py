"""The MiniMind language model: grouped-query attention, RoPE, SwiGLU, RMSNorm; dense or mixture of experts.

Usable by itself with `transformers` (generate, save_pretrained); nothing here knows of images or of training.
Shapes: B batch, T tokens of this call, S tokens the keys cover, N = B * T, V vocabulary, C hidden size,
H heads, K key/value heads, D head size, E routed experts, k experts per token, R rows packed into one.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import capture_outputs

LOSS_CHUNK = 4096  # supervised positions whose logits are held at once
YARN = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"}
RELEASE_3_NAMES = {"num_experts", "router_aux_loss_coef", "inference_rope_scaling"}
RELEASE_3_NAMES |= {"image_hidden_size", "image_token_len"}


class MiniMindConfig(PreTrainedConfig):
    """Everything that decides the language model's shape; all of it is written to `config.json`."""

    model_type = "minimind"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the library's class attribute)

    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    vocab_size: int = 6400
    intermediate_size: int | None = None
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    dropout: float = 0.0
    hidden_act: str = "silu"
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    use_moe: bool = False
    num_experts_per_tok: int = 2
    n_routed_experts: int = 4
    n_shared_experts: int = 1
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.1
    seq_aux: bool = True
    norm_topk_prob: bool = True
    head_dim: int | None = None
    qk_norm: bool = False
    moe_intermediate_size: int | None = None
    norm_top1_prob: bool = False  # norm_topk_prob holds for a single chosen expert as well
    rope_scaling: dict | None = None  # YaRN, with all keys of YARN

    def __post_init__(self, **kwargs):
        if names := ", ".join(sorted(RELEASE_3_NAMES & kwargs.keys())):
            raise ValueError(f"{names}: names of release 3, which common/weights.py translates into ours")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 64 * math.ceil(int(self.hidden_size * 8 / 3) / 64)
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        super().__post_init__(**kwargs)
        heads = f"num_attention_heads {self.num_attention_heads}"
        if self.head_dim is None and self.hidden_size % (2 * self.num_attention_heads):
            multiple = f"hidden_size {self.hidden_size} must be a multiple of twice {heads}"
            raise ValueError(f"{multiple}: heads are equal and RoPE rotates halves")
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE rotates halves")
        scaling = self.rope_scaling
        if scaling and (scaling.get("rope_type", scaling.get("type")) != "yarn" or YARN - scaling.keys()):
            keys = ", ".join(sorted(YARN))
            raise ValueError(f"rope_scaling is {scaling}, expected rope_type 'yarn' with {keys}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{heads} must be a multiple of num_key_value_heads {self.num_key_value_heads}")
        if self.scoring_func != "softmax":
            raise ValueError(f"scoring_func is {self.scoring_func!r}, but only 'softmax' exists")
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            chosen, experts = self.num_experts_per_tok, self.n_routed_experts
            raise ValueError(f"num_experts_per_tok {chosen} must be 1 to n_routed_experts {experts}")


@dataclass
class MiniMindOutput(ModelOutput):
    """`aux_loss` is a scalar, 0 for a dense model and outside training; `loss` is cross-entropy alone.
    `output_hidden_states` asks for `hidden_states`: embeddings and each block's output, the last one normed;
    `output_attentions` for `attentions` (B, H, T, S) of each block."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    aux_loss: Tensor | None = None
    past_key_values: Cache | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MiniMindForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MiniMindConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _no_split_modules = ["MiniMindBlock"]  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    @property
    def _can_record_outputs(self):
        return {"hidden_states": MiniMindBlock, "attentions": Attention}

    def __init__(self, config: MiniMindConfig | None = None):
        super().__init__(config if config is not None else self.config_class())
        self.model = MiniMindModel(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # normal with 0.02, biases zero, norms one
        if isinstance(module, MiniMindModel):
            # Not in any file, and without content after a construction on the meta device.
            cos, sin = rope_tables(self.config)
            init.copy_(module.freqs_cos, cos)
            init.copy_(module.freqs_sin, sin)

    @capture_outputs
    def forward(
        self,
        input_ids: LongTensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
        labels: LongTensor | None = None,
        position_ids: LongTensor | None = None,
        inputs_embeds: Tensor | None = None,
        **args,
    ) -> MiniMindOutput:
        """Logits `(B, T, V)`, or only those of the last `logits_to_keep` positions or of an index tensor's.
        `attention_mask` is `(B, S)` with 1 for real tokens (cached ones included), or a ready 4-D mask.

        `labels` are `(B, T)`, unshifted, -100 where nothing is learnt; `loss` is then the mean over
        supervised tokens, 0 if there are none. Two of `args` matter with them: `num_items_in_batch` divides
        the summed loss instead of this call's own count (gradient accumulation, several ranks), and
        `skip_logits=True` leaves `logits` and `last_hidden_state` None: the last layer's feed-forward and the
        head then work on supervised positions alone. What a batch of dataset/collate.py tells is not looked
        for, which would stop a GPU: `label_positions` and `label_ids` (N,) instead of `labels`,
        `sequence_ids` (B, T) with their number `sequences` instead of `attention_mask`, for rows that are
        padded on the right."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        positions, targets = args.get("label_positions"), args.get("label_ids")
        if labels is not None:
            following = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # (B * T,), -100 at a row's end
            positions = (following != -100).nonzero().squeeze(1)  # (supervised,)
            targets = following[positions]
        only_loss = positions is not None and args.get("skip_logits", False)
        loss = logits = None
        weights = args.get("output_attentions", self.config.output_attentions)
        told = positions if only_loss else None, weights, args.get("sequence_ids"), args.get("sequences", 1)
        given = input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
        hidden, aux_loss = self.model(*given, *told)
        if positions is not None:
            supervised = hidden if only_loss else select(hidden, positions)  # (supervised, C)
            items = args.get("num_items_in_batch")
            items = max(len(positions), 1) if items is None else items
            loss = self._loss_sum(supervised, targets) / items
        if not only_loss:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])  # (B, kept, V)
        return MiniMindOutput(loss, logits, aux_loss, past_key_values, None if only_loss else hidden)

    def _loss_sum(self, hidden: Tensor, targets: LongTensor) -> Tensor:
        """Summed fp32 cross-entropy of hidden states (N, C) and targets (N,); without any, 0 with gradients.
        At most `LOSS_CHUNK` positions have logits at a time."""
        if len(targets) > LOSS_CHUNK:
            # Recompute each chunk's logits in the backward pass rather than keep them all.
            chunks = zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
            return sum(checkpoint(self._loss_sum, *chunk, use_reentrant=False) for chunk in chunks)
        return F.cross_entropy(self.lm_head(hidden).float(), targets, reduction="sum")


class MiniMindModel(nn.Module):
    """Embedding, blocks and final norm: ids or embeddings in, hidden states and the auxiliary loss out."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(MiniMindBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        cos, sin = rope_tables(config)
        self.register_buffer("freqs_cos", cos, persistent=False)
        self.register_buffer("freqs_sin", sin, persistent=False)

    def embed(self, input_ids: LongTensor) -> Tensor:
        return self.dropout(self.embed_tokens(input_ids))  # (B, T, C)

    def forward(
        self,
        input_ids: LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        positions: LongTensor | None = None,
        output_attentions: bool = False,
        sequence_ids: LongTensor | None = None,
        sequences: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states (B, T, C), or (N, C) at flat `positions` (N,) alone; auxiliary loss."""
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        length = hidden.shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if isinstance(past, int) and past + length > self.config.max_position_embeddings:
            limit = self.config.max_position_embeddings
            raise ValueError(f"the input has {past + length} tokens, but max_position_embeddings is {limit}")
        given = attention_mask, position_ids, past_key_values
        is_told = sequence_ids is not None
        mask, members = sequence_masks(sequence_ids, sequences) if is_told else self._masks(hidden, *given)
        if position_ids is None:
            if attention_mask is not None and attention_mask.dim() == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]  # (B, T)
            else:
                position_ids = torch.arange(length, device=hidden.device)[None] + past  # (1, T)
        tables = self.freqs_cos, self.freqs_sin  # on the CPU where accelerate spreads the layers over devices
        cos, sin = (table[position_ids.to(table.device)].unsqueeze(2).to(hidden.device) for table in tables)
        rope = cos, signed(sin)  # (B or 1, T, 1, D) each
        attention = {"rope": rope, "mask": mask, "past_key_values": past_key_values}
        attention["output_attentions"] = output_attentions
        aux_loss = torch.zeros((), device=hidden.device)
        for layer in self.layers:
            wanted = positions if layer is self.layers[-1] else None
            hidden, layer_aux_loss = layer(hidden, members, wanted, **attention)
            aux_loss = aux_loss + layer_aux_loss
        return self.norm(hidden), aux_loss

    def _masks(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """What each token sees (B, 1, T, S), None where the plain causal mask gives the same answer for every
        real token; and which tokens each sequence of a row has (B, R, T), None where a row is one."""
        is_2d = attention_mask is not None and attention_mask.dim() == 2
        tokens = attention_mask[:, -hidden.shape[1] :].bool() if is_2d else None  # (B, T)
        if position_ids is not None and cache is None and (is_2d or attention_mask is None):
            starts = position_ids.expand(hidden.shape[:2]) == 0  # (B, T)
            if bool(starts[:, 1:].any()):  # packed
                numbers = starts.cumsum(-1) if tokens is None else starts.cumsum(-1).masked_fill(~tokens, -1)
                return sequence_masks(numbers, int(numbers.max()) + 1)
        sequences = tokens[:, None] if tokens is not None else None  # (B, 1, T)
        if tokens is not None and cache is None and bool((tokens[:, 1:] <= tokens[:, :-1]).all()):
            # With all padding on the right, a causal mask already hides it from every real token.
            return None, sequences
        return create_causal_mask(self.config, hidden, attention_mask, cache, position_ids), sequences


def sequence_masks(sequence_ids: LongTensor, sequences: int) -> tuple[Tensor | None, Tensor]:
    """As `_masks`, for right-padded rows; `sequence_ids` (B, T) are below `sequences`, -1 for padding."""
    numbers = torch.arange(sequences, device=sequence_ids.device)[:, None]
    members = sequence_ids[:, None] == numbers  # (B, R, T)
    if sequences == 1:
        return None, members
    return (sequence_ids[:, None, :] == sequence_ids[:, :, None]).tril()[:, None], members  # (B, 1, T, T)


class MiniMindBlock(GradientCheckpointingLayer):
    def __init__(self, config: MiniMindConfig, layer_index: int):
        super().__init__()
        self.self_attn = Attention(config, layer_index)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.use_moe else FeedForward(config, config.intermediate_size)

    def forward(
        self, hidden: Tensor, sequences: Tensor | None, positions: LongTensor | None, **attention
    ) -> tuple[Tensor, Tensor | float]:
        """(B, T, C) -> the same, or (N, C) at flat `positions` (N,) alone; and the auxiliary loss."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), **attention)[0]
        if isinstance(self.mlp, MoE):  # its balance depends on all tokens
            update, aux_loss = self.mlp(self.post_attention_layernorm(hidden), sequences)
            return select(hidden + update, positions), aux_loss
        hidden = select(hidden, positions)
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), 0.0


class Attention(nn.Module):
    def __init__(self, config: MiniMindConfig, layer_index: int):
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        q_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        norm = functools.partial(RMSNorm, self.head_dim, config.rms_norm_eps)
        self.q_norm, self.k_norm = (norm() if config.qk_norm else nn.Identity() for _ in range(2))
        self.dropout = config.dropout
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past_key_values: Cache | None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, C) -> the same, and the attention weights (B, H, T, S) where they are asked for."""
        B, T, _ = hidden.shape
        query = self.q_norm(self.q_proj(hidden).view(B, T, -1, self.head_dim))  # (B, T, H, D)
        key = self.k_norm(self.k_proj(hidden).view(B, T, -1, self.head_dim))  # (B, T, K, D)
        value = self.v_proj(hidden).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        rotated = rotate(torch.cat((query, key), 2), *rope).transpose(1, 2)  # (B, H + K, T, D)
        query, key = rotated.split((query.shape[2], key.shape[2]), 1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_index)  # (B, K, S, D)
        is_causal = T > 1 and mask is None  # in this order it is a bool also while torch.compile traces
        if is_causal and key.shape[2] > T:  # a static cache's free slots
            key, value = key[:, :, :T], value[:, :, :T]
        # GPU kernels that take a mask do not group heads; the fallback would hold all scores at once.
        grouped = mask is None or not hidden.is_cuda
        if not grouped:
            key, value = key.repeat_interleave(self.groups, 1), value.repeat_interleave(self.groups, 1)
        options = {"attn_mask": mask, "is_causal": is_causal, "enable_gqa": grouped}
        attend = functools.partial(F.scaled_dot_product_attention, query, key, **options)
        output = attend(value, dropout_p=self.dropout if self.training else 0.0)  # (B, H, T, D)
        weights = None
        if output_attentions:  # what values that are the identity give
            identity = torch.eye(key.shape[2]).to(key).expand(*key.shape[:2], -1, -1)  # (B, K, S, S)
            weights = attend(identity)  # (B, H, T, S)
        return self.resid_dropout(self.o_proj(output.transpose(1, 2).reshape(B, T, -1))), weights


class FeedForward(nn.Module):
    def __init__(self, config: MiniMindConfig, size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden)))


class MoE(nn.Module):
    """Each token goes to its k best routed experts, weighted by their scores, and to every shared expert."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        size = config.moe_intermediate_size
        self.experts = nn.ModuleList(FeedForward(config, size) for _ in range(config.n_routed_experts))
        self.shared_experts = nn.ModuleList(FeedForward(config, size) for _ in range(config.n_shared_experts))

    def forward(self, hidden: Tensor, sequences: Tensor | None = None) -> tuple[Tensor, Tensor | float]:
        """`sequences` (B, R, T) says which tokens belong to a row's R-th sequence, padding to none; if None,
        a row is one sequence. The second result is the auxiliary loss, 0 outside training."""
        scores = self.gate(hidden).softmax(-1, dtype=torch.float32)  # (B, T, E)
        weights, choices = scores.topk(self.config.num_experts_per_tok, dim=-1, sorted=False)  # (B, T, k)
        is_normed = self.config.num_experts_per_tok > 1 or self.config.norm_top1_prob
        if is_normed and self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        chosen = torch.zeros_like(scores).scatter_(-1, choices, 1.0)  # (B, T, E), 1 where chosen
        flat = (states.flatten(0, 1) for states in (hidden, choices, weights, chosen))  # (N, ...)
        output = self._routed(*flat).view_as(hidden)
        for expert in self.shared_experts:
            output = output + expert(hidden)
        return output, self._balance_loss(scores, chosen, sequences) if self.training else 0.0

    @torch.compiler.disable  # sizes that depend on the data: it would compile again and again
    def _routed(self, tokens: Tensor, choices: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Tokens (N, C), choices, weights (N, k) and `chosen` (N, E) -> (N, C): gathered, and put back."""
        k = choices.shape[1]
        order = choices.flatten().argsort(stable=True)  # (N * k,), choices sorted by expert
        counts = chosen.sum(0).int()  # (E,); bincount would stop a GPU
        gathered = tokens.index_select(0, order // k)  # (N * k, C)
        is_plain = type(self.experts[0].up_proj) is nn.Linear  # not quantized, no adapter around it
        run = self._grouped_experts if is_plain and has_grouped_matmul(gathered) else self._sliced_experts
        outputs = run(gathered, counts)
        outputs = torch.empty_like(outputs).index_copy_(0, order, outputs)  # back in the tokens' order
        return (outputs.view(-1, k, tokens.shape[1]) * weights.unsqueeze(-1).type_as(outputs)).sum(1)

    def _sliced_experts(self, gathered: Tensor, counts: Tensor) -> Tensor:
        # In training an expert without tokens runs on none: its gradient is then zero, not missing (DDP).
        parts = zip(self.experts, gathered.split(counts.tolist()), strict=True)
        return torch.cat([expert(part) for expert, part in parts if len(part) or self.training])  # (N * k, C)

    def _grouped_experts(self, gathered: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0, dtype=torch.int32)  # (E,)
        dtype = matmul_dtype(gathered)

        def project(states: Tensor, name: str) -> Tensor:
            # Autocast does not know grouped_mm.
            weights = [getattr(expert, name).weight.to(dtype) for expert in self.experts]
            return F.grouped_mm(states.to(dtype), torch.stack(weights).transpose(1, 2), offs=ends)

        first = self.experts[0]
        inner = first.activation(project(gathered, "gate_proj")) * project(gathered, "up_proj")
        return first.dropout(project(inner, "down_proj"))  # (N * k, C)

    def _balance_loss(self, scores: Tensor, chosen: Tensor, sequences: Tensor | None) -> Tensor:
        """alpha * mean over sequences of the sum over experts of (share of choices * E) * (mean score)."""
        both = torch.cat((chosen, scores), -1)  # (B, T, 2 * E)
        if sequences is None:
            sequences = torch.ones_like(scores[..., 0]).bool()[:, None]  # (B, 1, T)
        if not self.config.seq_aux:  # all tokens of the batch as one sequence
            both, sequences = both.flatten(0, 1)[None], sequences.any(1).flatten()[None, None]
        tokens = sequences.sum(-1, keepdim=True)  # (B, R, 1)
        means = (both[:, None] * sequences.unsqueeze(-1)).sum(2) / tokens.clamp(min=1)  # (B, R, 2 * E)
        share, mean_score = means.chunk(2, -1)  # (B, R, E) each, 0 where a sequence has no token
        factor = self.config.aux_loss_alpha * scores.shape[-1] / self.config.num_experts_per_tok
        return factor * (share * mean_score).sum() / (tokens > 0).sum().clamp(min=1)


def has_grouped_matmul(states: Tensor) -> bool:
    """Whether one kernel multiplies all experts' tokens: CUDA in bf16, rows of whole 16 bytes. Not on CPUs,
    where `grouped_mm` is a loop inside that copies weights, some 3% slower than slices (512 x 1408, fp32)."""
    known = hasattr(F, "grouped_mm")  # not before torch 2.10
    if not known or not states.is_cuda or matmul_dtype(states) != torch.bfloat16 or states.shape[1] % 8:
        return False
    return torch.cuda.get_device_capability(states.device) >= (8, 0)


def matmul_dtype(states: Tensor) -> torch.dtype:
    """What a linear layer would compute in here."""
    device = states.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast else states.dtype


def select(hidden: Tensor, positions: LongTensor | None) -> Tensor:
    """(B, T, C) -> (N, C) at flat positions (N,); None: all of it, as it is."""
    return hidden if positions is None else hidden.flatten(0, 1).index_select(0, positions)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(matmul_dtype(hidden))  # once, not for each product that takes it


def rope_tables(config: MiniMindConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(max_position_embeddings, D)` of Su et al. 2021, both halves alike."""
    inverse = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    yarn, magnitude = config.rope_scaling, 1.0
    if yarn and config.max_position_embeddings > yarn["original_max_position_embeddings"]:
        inverse, magnitude = yarn_frequencies(inverse, config), yarn["attention_factor"]  # (D / 2,)
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), inverse)  # (positions, D / 2)
    angles = torch.cat((angles, angles), dim=-1)  # (positions, D)
    return angles.cos() * magnitude, angles.sin() * magnitude


def yarn_frequencies(inverse: Tensor, config: MiniMindConfig) -> Tensor:
    """YaRN (Peng et al. 2023): frequencies (D / 2,) that turn `beta_fast` times or more within the original
    length stay, those that turn `beta_slow` times or less are divided by `factor`, with a ramp between."""
    yarn, pairs = config.rope_scaling, len(inverse)

    def pair(turns: float) -> float:
        length = yarn["original_max_position_embeddings"] / (2 * math.pi * turns)
        return pairs * math.log(length) / math.log(config.rope_theta)

    low = max(math.floor(pair(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair(yarn["beta_slow"])), pairs - 1)
    ramp = ((torch.arange(pairs) - low) / max(high - low, 0.001)).clamp(0, 1)  # (D / 2,)
    return inverse * (1 - ramp + ramp / yarn["factor"])


def signed(sin: Tensor) -> Tensor:
    """Sines (..., D) as `rotate` takes them: those of the first half negated."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on (B, T, heads, D), rotating halves; the tables' precision, the states' dtype."""
    return (states * cos + states.roll(states.shape[-1] // 2, -1) * sin).type_as(states)
