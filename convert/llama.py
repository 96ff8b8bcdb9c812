"""The target `llama`: the language model alone, as Llama, Qwen2-MoE, Qwen3 or Qwen3-MoE."""

from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert.export import Source, compare, prepare_tokenizer, save_generation_config, save_tensors
from convert.names import to_text_config, to_text_state

verify = partial(compare, model_class=AutoModelForCausalLM, processor_class=AutoTokenizer)
CLASSES = {"llama": "Llama", "qwen2_moe": "Qwen2Moe", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}


def write(folder: Path, source: Source) -> None:
    ours = source.model.config
    config = to_text_config(ours)
    config.architectures = [f"{CLASSES[config.model_type]}ForCausalLM"]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    text = to_text_state(source.model.state_dict(), ours)
    if ours.tie_word_embeddings:
        del text["lm_head.weight"]
    save_tensors(folder, text)
    save_generation_config(folder, ours)
    tokenizer = source.processor.tokenizer
    prepare_tokenizer(tokenizer)
    tokenizer.save_pretrained(folder)
