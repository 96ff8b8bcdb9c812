"""Makes a base for training of a language model of Llama's or Qwen3's architecture, mixtures included.

`--source` is a transformers folder, or the name of a model on the hub. Writes `lm_{width}.pth`, its sidecar
and its tokenizer to `--out`: weights in fp16, compared with the source, and a token that stands for an image.
"""

import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_DISABLE_XET"] = "1"  # read on import; the hub's Xet transport goes past HF_ENDPOINT

import torch
from huggingface_hub import snapshot_download
from transformers import AddedToken, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import UserError, flag, parse_flags, run_main, user_errors
from common.setup import TOKENIZERS, special_ids
from common.weights import FIXED_3, describe, half_state, save_weights, weight_name
from convert.export import prepare_tokenizer, replacing, write_errors
from convert.names import CONFIGS, KINDS, from_text_config
from convert.pth import read_language_model
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.processing_vlm import PLACEHOLDERS
from scripts.download import hub_errors

log = logging.getLogger(__name__)
DESCRIPTION = ["config.json", "tokenizer*.json", "special_tokens_map.json", "chat_template*"]
WEIGHTS = (
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
)
PLACEHOLDER = PLACEHOLDERS[0]
START, END, NO_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TOLERANCE = 1e-4  # largest difference of a logit in fp32
PROMPTS = (
    "A picture is worth a thousand words.",
    "The quick brown fox jumps over the lazy dog, 3.14159 times a day.\n\n- What is this?\n- A deer.",
    "北京是中国的首都。这张图片里有什么？",
    "def area(radius: float) -> float:\n    return math.pi * radius**2\n",
)
# A conversation that ends in an answer, without and with a system turn, and how ChatML writes it.
TURNS = [
    ("user", "What is this?"),
    ("assistant", "A deer."),
    ("user", "Where?"),
    ("assistant", "On the left."),
]
SYSTEM_TURN = ("system", "Answer in a few words.")
OWN_SYSTEM_TURN = rf"(?:{re.escape(START)}system\n.*?{re.escape(END)}\n)?"
THINK_BLOCK = r"(?:<think>\n\n</think>\n\n)?"  # of Qwen3 and of release 3
# Prompts then end in the block that stands before what is learnt, and answers come without it. Servers say
# `enable_thinking` of themselves: what they say does not count.
NO_THINKING = "{%- set enable_thinking = false -%}\n"


@dataclass
class ImportFlags:
    source: str = field(metadata={"help": "a transformers folder, or a model on the hub: OWNER/NAME"})
    out: str = flag("out", "folder for the weights, their sidecar and their tokenizer")


def main() -> None:
    flags = parse_flags(ImportFlags, __doc__)
    transformers_logging.disable_progress_bar()
    with user_errors(f"--source {flags.source}"):
        folder, revision = fetched(flags.source)
        for name in ("config.json", "tokenizer.json"):
            if not (folder / name).is_file():
                raise ValueError(f"it has no {name}: expected a language model's transformers folder")
        config = read_config(folder)
        tokenizer = read_tokenizer(folder)
        if (tokens := len(tokenizer)) > config.vocab_size:
            raise ValueError(f"its tokenizer has {tokens} tokens, but vocab_size is {config.vocab_size}")
        add_tokens(tokenizer)
        set_template(tokenizer)
        fetch_weights(flags.source, revision)
        model = read_language_model(folder, config)
        difference = largest_difference(model, folder, config, tokenizer)
    log.info("largest difference of a logit from the source with its weights in fp16: %.2g", difference)
    fit_rows(model, tokens, len(tokenizer))
    save(model, tokenizer, Path(flags.out), {"source": flags.source, "revision": revision})


def fetched(source: str) -> tuple[Path, str | None]:
    """The source's folder; from the hub, all but its weights, in the hub's cache, and their revision."""
    if Path(source).is_dir():
        return Path(source), None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(f"--source {source}: no such folder, and not the OWNER/NAME of a model on the hub")
    with hub_errors():
        folder = Path(snapshot_download(source, allow_patterns=DESCRIPTION))
    log.info("%s: revision %s, in %s", source, folder.name, folder)
    return folder, folder.name


def fetch_weights(source: str, revision: str | None) -> None:
    for patterns in WEIGHTS if revision else ():
        with hub_errors():
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
        if any(folder.glob(patterns[0])):
            return


def read_config(folder: Path) -> PreTrainedConfig:
    """ValueError for a model that ours cannot express, as far as its config tells."""
    try:
        fields, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
        if (kind := fields.get("model_type")) not in KINDS:  # some bring code of their own: it is not run
            raise ValueError(f"model_type is {kind!r}, expected one of {', '.join(sorted(KINDS))}")
        if quantized := fields.get("quantization_config"):
            method = quantized.get("quant_method")
            raise ValueError(f"its weights are quantized ({method}), expected plain ones")
        config = CONFIGS[KINDS[kind]].from_pretrained(folder, local_files_only=True)
        ours = MiniMindConfig(**from_text_config(config))
        with torch.device("meta"):
            MiniMindForCausalLM(ours)
    except (OSError, ValueError):
        raise
    except Exception as error:  # the library and torch have many for values that make no sense
        raise ValueError(f"config.json makes no model: {error}") from error
    heads = f"{config.num_attention_heads} heads, {config.num_key_value_heads} of them for keys and values"
    size = f"{config.hidden_size} x {config.num_hidden_layers}, {heads}"
    log.info("%s: %s, vocabulary of %d", kind, size, config.vocab_size)
    return config


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the library raises for a damaged file
        raise ValueError(f"its tokenizer cannot be read: {error}") from error
    if len(tokenizer) != (end := max(tokenizer.get_vocab().values()) + 1):
        raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, but ids up to {end - 1}")
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """What our processor needs: tokens that begin and end a turn, one for an image, one for padding."""
    before = {name: getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    for token in (START, END, PLACEHOLDER):
        is_new = tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)])
        what = "added: its row starts as the mean of all" if is_new else "which it has"
        log.info("%s is token %d, %s", token, tokenizer.convert_tokens_to_ids(token), what)
    known = tokenizer.get_vocab()
    fitting = [token for token in (before["pad"], NO_TEXT, before["eos"], before["unk"]) if token in known]
    pad = next((token for token in fitting if token not in (START, END, PLACEHOLDER)), END)
    for name, token in {"bos": START, "eos": END, "pad": pad}.items():
        setattr(tokenizer, f"{name}_token", token)
        if token != before[name]:
            log.info("%s_token was %s, is %s now", name, before[name], token)


def set_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Keeps ChatML, gives our template to a model without any; ValueError for any other."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = Path(TOKENIZERS[2], "chat_template.jinja").read_text(encoding="utf-8")
        log.info("it has no chat template: ours goes with it")
    tokenizer.chat_template = tokenizer.get_chat_template()  # of several, the one for chats
    check_template(tokenizer, TURNS)
    check_template(tokenizer, [SYSTEM_TURN, *TURNS])
    thinking, not_thinking = (
        rendered(tokenizer, TURNS[:-1], add_generation_prompt=True, **options)
        for options in ({}, {"enable_thinking": False})
    )
    if thinking != not_thinking:
        tokenizer.chat_template = NO_THINKING + tokenizer.chat_template
        log.info("its chat template can ask for thinking: its first line now says that none is wanted")
        check_template(tokenizer, TURNS)


def check_template(tokenizer: PreTrainedTokenizerFast, turns: Sequence[tuple[str, str]]) -> None:
    """ValueError where `turns` do not become what our processor looks for: ChatML, in which an empty think
    block may stand before an answer, and prompts that end where the answer begins, or its block."""
    expected = "" if turns[0] == SYSTEM_TURN else OWN_SYSTEM_TURN
    for role, text in turns:
        answer = (THINK_BLOCK if role == "assistant" else "") + re.escape(f"{text}{END}\n")
        expected += re.escape(f"{START}{role}\n") + answer
    whole, prompt = rendered(tokenizer, turns), rendered(tokenizer, turns[:-1], add_generation_prompt=True)
    is_chatml = re.fullmatch(f"{expected}?", whole, re.DOTALL) and whole.startswith(prompt)
    if not (is_chatml and re.fullmatch(f"{answer}?", whole.removeprefix(prompt))):
        raise ValueError(f"its chat template is not ChatML: a prompt ends in {prompt[-200:]!r}")


def rendered(tokenizer: PreTrainedTokenizerFast, turns: Sequence[tuple[str, str]], **options: bool) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # templates are programs
        raise ValueError(f"its chat template fails: {error}") from error


@torch.no_grad()
def largest_difference(
    model: MiniMindForCausalLM, folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> float:
    """Of a logit, with the weights of both models rounded to fp16, in fp32; ValueError above TOLERANCE."""
    source = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, local_files_only=True
    ).eval()
    for parameter in (*model.parameters(), *source.parameters()):
        parameter.copy_(parameter.half())
    prompts = [torch.tensor([tokenizer.encode(text, add_special_tokens=False)]) for text in PROMPTS]
    generator = torch.Generator().manual_seed(0)
    prompts += [torch.randint(config.vocab_size, (2, 64), generator=generator)]
    largest = 0.0
    for ids in prompts:  # (B, T)
        ids = ids[:, : config.max_position_embeddings]
        difference = (model(ids).logits - source(ids).logits).abs().max().item()
        largest = max(largest, difference)
        if not difference <= TOLERANCE:  # NaN is no success either
            raise ValueError(
                f"a logit differs by {difference:.2g} from the source, at most {TOLERANCE:g} is expected"
            )
    return largest


@torch.no_grad()
def fit_rows(model: MiniMindForCausalLM, known: int, size: int) -> None:
    """Gives embedding and head `size` rows: the first `known` stay, the others are the mean of these."""
    if (unused := model.config.vocab_size - known) > 0:
        log.info("the last %d rows of the vocabulary belong to no token: they are left out", unused)
    model.resize_token_embeddings(size, mean_resizing=False)
    for layer in (model.model.embed_tokens, model.lm_head):
        layer.weight[known:] = layer.weight[:known].mean(0)


def save(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    arguments: dict[str, str | None],
) -> None:
    """Writes weights, sidecar and tokenizer, each whole or as it was before; UserError if that fails."""
    config = model.config
    path = out / weight_name("lm", config.hidden_size, config.use_moe)
    place = out / f"{path.stem}_tokenizer"
    if place.exists() and not (place / "tokenizer.json").is_file():
        raise UserError(f"{place} is in the way: it is no tokenizer's folder, and stays as it is")
    for name, value in special_ids(tokenizer).items():
        setattr(config, name, value)
    sidecar = describe(model, tokenizer, stage="lm", step=0, arguments=arguments)
    sidecar["tokenizer"]["path"] = str(place)
    if config.qk_norm:
        sidecar["config"]["projector"] = FIXED_3["projector"]  # whose defaults training takes with it
    prepare_tokenizer(tokenizer)
    with replacing(place) as folder:
        with write_errors(place):
            tokenizer.save_pretrained(folder)
        save_weights(path, half_state(model.state_dict()), sidecar)
    positions = config.max_position_embeddings
    megabytes = 2 * 4 * positions * config.head_dim / 1e6
    told = "rows of up to %d tokens fit (--max_seq_len): RoPE's tables take %.1f MB of memory"
    log.info(told, positions, megabytes)
    log.info("%s (%.0f MB), %s, %s", path, path.stat().st_size / 1e6, path.with_suffix(".json").name, place)


if __name__ == "__main__":
    run_main(main)
