"""The language model under the names of the library's architectures, and back: config fields and weights.

Without query norms it is Llama's (dense) or Qwen2-MoE's, with them Qwen3's or Qwen3-MoE's. In both
directions ValueError names what the other side cannot express.
"""

import re

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.model_minimind import YARN, MiniMindConfig, yarn_frequencies

State = dict[str, Tensor]
CONFIGS = {(False, False): LlamaConfig, (False, True): Qwen2MoeConfig}  # by (qk_norm, use_moe)
CONFIGS |= {(True, False): Qwen3Config, (True, True): Qwen3MoeConfig}
KINDS = {config.model_type: kind for kind, config in CONFIGS.items()}
ALIKE = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size hidden_act"
ALIKE += " intermediate_size max_position_embeddings rms_norm_eps tie_word_embeddings"
ALIKE += " bos_token_id eos_token_id pad_token_id"
MIXTURE = {"n_routed_experts": "num_experts", "num_experts_per_tok": "num_experts_per_tok"}  # ours: theirs
MIXTURE |= {"moe_intermediate_size": "moe_intermediate_size", "aux_loss_alpha": "router_aux_loss_coef"}
# Names, axis along which shared experts are one, and what Qwen2-MoE multiplies their sum with: a sigmoid,
# which is 0.5 where the weights of the shared expert's gate are zero.
PROJECTIONS = (("gate_proj", 0, 1), ("up_proj", 0, 1), ("down_proj", 1, 0.5))


def to_text_config(config: MiniMindConfig, vocab_size: int | None = None) -> PreTrainedConfig:
    """The library's config for our language model, with `vocab_size` tokens if it is given."""
    fields = {name: getattr(config, name) for name in ALIKE.split()}
    fields |= {"attention_dropout": config.dropout, "vocab_size": vocab_size or config.vocab_size}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    yarn = config.rope_scaling
    if yarn and config.max_position_embeddings > yarn["original_max_position_embeddings"]:
        fields["rope_parameters"] |= {"rope_type": "yarn", **{name: yarn[name] for name in YARN}}
    if config.use_moe:
        fields |= {theirs: getattr(config, ours) for ours, theirs in MIXTURE.items()}
        is_normed = config.num_experts_per_tok > 1 or config.norm_top1_prob
        fields |= {"norm_topk_prob": config.norm_topk_prob and is_normed, "decoder_sparse_step": 1}
        if not config.qk_norm:
            shared = max(config.n_shared_experts, 1) * config.moe_intermediate_size
            # vLLM builds biases whatever the config says, and leaves them without values if a file has none.
            fields |= {"shared_expert_intermediate_size": shared, "qkv_bias": True}
        elif shared := config.n_shared_experts:
            raise ValueError(f"n_shared_experts is {shared}: Qwen3-MoE has no shared experts")
    theirs = CONFIGS[config.qk_norm, config.use_moe](**fields)
    _check_rope(theirs, config)
    return theirs


def to_text_state(state: State, config: MiniMindConfig) -> State:
    """Our weights under the names of the library's files; a VLM's encoder and projection are left out."""
    result = {key: value for key, value in state.items() if key.startswith(("model.", "lm_head."))}
    if not config.use_moe or config.qk_norm:
        return result
    for layer in range(config.num_hidden_layers):
        mlp, attention = (f"model.layers.{layer}.{part}." for part in ("mlp", "self_attn"))
        for name, axis, weight in PROJECTIONS:
            key, numbers = f"{name}.weight", range(config.n_shared_experts)
            shared = [result.pop(f"{mlp}shared_experts.{i}.{key}") for i in numbers]
            joined = torch.cat(shared or [torch.zeros_like(result[f"{mlp}experts.0.{key}"])], axis)
            result[f"{mlp}shared_expert.{key}"] = joined / weight
        gate = result[f"{mlp}gate.weight"]  # (E, C)
        result[f"{mlp}shared_expert_gate.weight"] = torch.zeros_like(gate[:1])
        for name in "qkv":
            weight = result[f"{attention}{name}_proj.weight"]
            result[f"{attention}{name}_proj.bias"] = torch.zeros_like(weight[:, 0])
    return result


def from_text_config(theirs: PreTrainedConfig) -> dict:
    """Fields of MiniMindConfig for the library's config, but for `n_shared_experts`, which weights tell."""
    if theirs.model_type not in KINDS:
        raise ValueError(f"model_type is {theirs.model_type!r}, expected one of {', '.join(sorted(KINDS))}")
    qk_norm, use_moe = KINDS[theirs.model_type]
    fields = {name: getattr(theirs, name, None) for name in ALIKE.split()}
    fields |= {"qk_norm": qk_norm, "use_moe": use_moe, "dropout": theirs.attention_dropout}
    if "sliding_attention" in (getattr(theirs, "layer_types", None) or ()):
        raise ValueError(f"sliding_window is {theirs.sliding_window}: every token here sees all before it")
    if use_moe:
        fields |= {ours: getattr(theirs, name) for ours, name in MIXTURE.items()}
        fields["norm_topk_prob"] = is_normed = theirs.norm_topk_prob
        fields["norm_top1_prob"] = is_normed and (qk_norm or theirs.num_experts_per_tok == 1)
        fields["seq_aux"] = not qk_norm  # as either release has it
        if (step := theirs.decoder_sparse_step) != 1 or theirs.mlp_only_layers:
            found = f"decoder_sparse_step {step}, mlp_only_layers {theirs.mlp_only_layers}"
            raise ValueError(f"{found}: every layer here has experts")
    fields |= _rope_fields(theirs)
    _check_rope(theirs, MiniMindConfig(**fields))
    return fields


def from_text_state(state: State, theirs: PreTrainedConfig) -> tuple[State, dict[str, int]]:
    """Our weights for those of the library's model in memory (`model.layers...`, `lm_head`), and the field
    of our config that they tell: how many shared experts a mixture has."""
    result, shared_experts = {}, 0
    for key, value in state.items():
        if found := re.fullmatch(r"(.*\.mlp\.experts\.)(gate_up|down)_proj", key):
            names = found[2].split("_")
            for expert, fused in enumerate(value):
                for name, part in zip(names, fused.chunk(len(names)), strict=True):
                    result[f"{found[1]}{expert}.{name}_proj.weight"] = part
        elif key.endswith((".bias", ".shared_expert_gate.weight")):
            if value.count_nonzero():
                raise ValueError(f"{key} has values that are not zero: there is no such weight here")
        elif not (found := re.fullmatch(r"(.*\.mlp\.)shared_expert\.(\w+)\.weight", key)):
            result[key] = value
        elif state[f"{found[1]}shared_expert.down_proj.weight"].count_nonzero():
            shared_experts = theirs.shared_expert_intermediate_size // theirs.moe_intermediate_size
            ((name, axis, weight),) = (row for row in PROJECTIONS if row[0] == found[2])
            for i, part in enumerate((value * weight).chunk(shared_experts, axis)):
                result[f"{found[1]}shared_experts.{i}.{name}.weight"] = part
    return result, {"n_shared_experts": shared_experts} if hasattr(theirs, "num_experts") else {}


def _rope_fields(theirs: PreTrainedConfig) -> dict:
    rope = theirs.rope_parameters
    kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor") or 1
    if kind not in ("default", "yarn") or part != 1 or rope.get("mscale"):
        raise ValueError(f"rope_parameters are {rope}, expected plain RoPE or YaRN over whole heads")
    if kind == "default":
        return {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    _, magnitude = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    given = {name: value for name, value in rope.items() if name in YARN and value is not None}
    scaling = {"beta_fast": 32, "beta_slow": 1, **given, "rope_type": "yarn", "attention_factor": magnitude}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def _check_rope(theirs: PreTrainedConfig, ours: MiniMindConfig) -> None:
    """ValueError where YaRN gives other frequencies there than here: ours has no options for its corners."""
    rope = theirs.rope_parameters
    if rope.get("rope_type") != "yarn":
        return
    inverse = 1.0 / ours.rope_theta ** (torch.arange(0, ours.head_dim, 2).float() / ours.head_dim)
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    applies = ours.max_position_embeddings > rope["original_max_position_embeddings"]
    if not (applies and torch.allclose(yarn_frequencies(inverse, ours), expected, rtol=1e-5, atol=0)):
        raise ValueError(f"rope_parameters {rope} mean other frequencies here than in the library's YaRN")
