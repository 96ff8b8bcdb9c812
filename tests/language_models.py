"""Stand-ins for language models that others publish: transformers folders with random weights, and tokenizers
trained on a little text, with the control tokens, settings and chat templates (of the same outcome) of
SmolLM2's and Qwen3's; and one of the older kind that marks words instead of bytes, without a template."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

TEXTS = sorted((Path(__file__).parent / "data").glob("everyday_*.txt"))
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.1)
KINDS = {
    "smollm2": dict(rope_theta=1e5, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "qwen3": dict(rope_theta=1e6, tie_word_embeddings=True, rms_norm_eps=1e-6, head_dim=32),
    "base": dict(rope_theta=1e4, tie_word_embeddings=False, rms_norm_eps=1e-5, attention_bias=True),
    "qwen3_moe": dict(
        rope_theta=1e6, tie_word_embeddings=False, head_dim=32, num_experts=4, moe_intermediate_size=32
    )
    | dict(num_experts_per_tok=2, norm_topk_prob=True),
}
CLASSES = {"smollm2": LlamaConfig, "qwen3": Qwen3Config, "base": LlamaConfig, "qwen3_moe": Qwen3MoeConfig}
SMOLLM2_TEMPLATE = """{% if messages[0].role != 'system' %}<|im_start|>system
You are SmolLM<|im_end|>
{% endif %}{% for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Answers after the user's last turn have their reasoning; of those before, only what was said is kept.
QWEN3_TEMPLATE = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- set parts = m.content.split('</think>') %}
{%- set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' %}
{%- set said = parts[-1].lstrip('\\n') if parts | length > 1 else m.content %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}{{- said }}
{%- else %}{{- m.content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
QWEN3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MEDIA = "vision_start vision_end vision_pad image_pad video_pad"


def write_model(folder: Path, kind: str = "smollm2", spare: int = 0, **changes: Any) -> Path:
    """A model of `kind` whose vocabulary has `spare` rows that no token has; `changes` go to its config."""
    tokens = write_tokenizer(folder, kind)
    torch.manual_seed(0)
    fields = SMALL | {"rope_parameters": {"rope_type": "default"}} | KINDS[kind]
    fields["rope_parameters"] = fields["rope_parameters"] | {"rope_theta": fields.pop("rope_theta")}
    config: PreTrainedConfig = CLASSES[kind](**fields | {"vocab_size": tokens + spare} | changes)
    model = AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, kind: str) -> int:
    """Returns how many tokens it has."""
    tokenizer, settings = {"smollm2": smollm2, "base": base}.get(kind, qwen3)()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        number: {"content": token.content, "special": token.special, "normalized": token.normalized}
        for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    settings |= {"added_tokens_decoder": added, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def smollm2() -> tuple[Tokenizer, dict]:
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)])
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"])
    tokens = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokens |= dict(unk_token="<|endoftext|>", tokenizer_class="GPT2Tokenizer")
    return tokenizer, tokens | {"chat_template": SMOLLM2_TEMPLATE}


def qwen3() -> tuple[Tokenizer, dict]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN3_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, [])
    special = [f"<|{name}|>" for name in f"endoftext im_start im_end {MEDIA}".split()]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    plain = "<tool_call> </tool_call> <think> </think>".split()
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    tokens = dict(bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None)
    return tokenizer, tokens | {"chat_template": QWEN3_TEMPLATE, "tokenizer_class": "Qwen2Tokenizer"}


def base() -> tuple[Tokenizer, dict]:
    """As of the first Llamas: a mark before each word, bytes where the vocabulary ends, no padding token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    mark = "\u2581"
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(mark), normalizers.Replace(" ", mark)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    train(tokenizer, ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    return tokenizer, dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True)


def train(tokenizer: Tokenizer, special: list[str]) -> None:
    is_bytes = isinstance(tokenizer.decoder, decoders.ByteLevel)
    trainer = trainers.BpeTrainer(
        vocab_size=600 + len(special),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if is_bytes else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator((path.read_text(encoding="utf-8") for path in TEXTS), trainer)
