"""Stand-ins for what release 3 (minimind-3v, 2026) publishes: its tokenizer's added tokens and ids, with a
chat template of the same outcome, weights in its key layout, its encoder's config with fewer layers."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

from common.weights import half_state, translated
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig

PREPROCESSOR = Path(__file__).parent / "golden/v3/siglip/preprocessor_config.json"
MEDIA = "object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start vision_end"
MEDIA += " vision_pad image_pad video_pad audio_start audio_end audio_pad"
TTS = "<tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single>"
TEXT = "<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>"
SPECIAL = [*(f"<|{name}|>" for name in f"endoftext im_start im_end {MEDIA}".split()), *TTS.split()]
PLAIN = [*TEXT.split(), *(f"<|buffer{i}|>" for i in range(1, 10))]
VOCAB_SIZE = 6400
# Reasoning that stands in an answer is split off, as the published template does it.
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- set parts = message['content'].split('</think>') %}
{%- set reasoning = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' %}
{{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' + parts[-1].lstrip('\\n') }}
{%- else %}{{- message['content'] }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{%- endif %}"""


def make_tokenizer(file: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer in the `tokenizer.json` at `file`, else one with the published added tokens and bytes
    under their ids, and names that no text has in place of the merges; with the stand-in's template."""
    backend = {"tokenizer_file": file}
    if file is None:
        names = [*SPECIAL, *PLAIN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        names += [f"filler {i}" for i in range(len(names), VOCAB_SIZE)]
        made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
        made.add_tokens([AddedToken(name, special=False, normalized=False) for name in PLAIN])
        backend = {"tokenizer_object": made}
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(**backend, **tokens, chat_template=TEMPLATE)


def write_encoder(folder: Path, layers: int = 2, pixels: int = 256) -> Path:
    """SigLIP2-B/32 as published (64 tokens of 768), with random weights and fewer layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    config = SiglipVisionConfig(**sizes, num_hidden_layers=layers, image_size=pixels, patch_size=32)
    SiglipVisionModel(config).save_pretrained(folder)
    preprocessor = json.loads(PREPROCESSOR.read_text()) | {"size": {"height": pixels, "width": pixels}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def make_state(
    config: dict | None = None, visual: bool = True, encoder: Path | None = None
) -> dict[str, torch.Tensor]:
    """A state dict in the published key layout, fp16 and without the encoder; `config` in the release's names
    (768 wide and two layers if it does not say). The projection is as wide as `encoder`, else 768."""
    torch.manual_seed(0)
    ours = VLMConfig(**translated({"num_hidden_layers": 2} | (config or {})))
    model = MiniMindVLM(ours, encoder) if visual else MiniMindForCausalLM(ours)
    return half_state(model.state_dict())
