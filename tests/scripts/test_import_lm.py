"""`scripts/import_lm.py`: language models of Llama's and Qwen3's architecture as bases; what is refused."""

import json
import logging
import resource
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, ROOT, TINY_ENCODER
from hub_stub import COMMIT, HubStub
from huggingface_hub import constants
from language_models import QWEN3_TEMPLATE, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

import convert_to_hf
from common.cli import run_main
from common.tokenizer import check_tokenizer, load_tokenizer
from common.weights import load_weights_file, release_of
from convert.names import from_text_config
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import load_weights
from model.processing_vlm import MiniMindVLMProcessor
from scripts import import_lm

SIGLIP = GOLDEN / "v3/siglip"
MOST_DIFFERENT = 1e-4  # of a logit


@pytest.fixture
def entry_point(monkeypatch, capsys, caplog):
    """Runs one in this process: (exit code, last line of stderr)."""
    caplog.set_level(logging.INFO)

    def run(main, *arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_main(main)
        lines = capsys.readouterr().err.strip().splitlines()
        return end.value.code or 0, lines[-1] if lines else ""

    return run


@pytest.fixture
def bring(entry_point, tmp_path):
    """Imports a model: (exit code, last line of stderr)."""

    def run(source, out: Path = tmp_path / "out") -> tuple[int, str]:
        return entry_point(import_lm.main, "--source", source, "--out", out)

    return run


def read_base(path: Path) -> tuple[MiniMindForCausalLM, dict]:
    state, sidecar = load_weights_file(path)
    names = MiniMindConfig.__annotations__.keys() & sidecar["config"].keys()
    model = MiniMindForCausalLM(MiniMindConfig(**{name: sidecar["config"][name] for name in names})).eval()
    load_weights(model, state)
    return model, sidecar


def rounded_source(folder: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- weights and config


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("smollm2", {}),
        ("smollm2", {"head_dim": 48, "num_key_value_heads": 1, "rope_parameters": YARN}),
        ("base", {}),
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
        ("qwen3_moe", {}),
    ],
    ids=["tied", "YaRN, heads of other sizes", "untied, zero biases", "Qwen3", "Qwen3 untied", "mixture"],
)
def test_logits_are_those_of_the_source_in_fp16(bring, tmp_path, kind, changes):
    source = write_model(tmp_path / "source", kind, **changes)

    assert bring(source) == (0, "")

    is_moe = kind.endswith("_moe")
    model, sidecar = read_base(tmp_path / f"out/lm_64{'_moe' if is_moe else ''}.pth")
    theirs = rounded_source(source)
    known = theirs.config.vocab_size
    for length in (1, 40, 600):
        ids = torch.randint(known, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected, found = theirs(ids).logits, model(ids).logits[..., :known]
        torch.testing.assert_close(found, expected, atol=MOST_DIFFERENT, rtol=0)
    assert expected.std() > 0.05, "the logits are nearly equal: this test shows nothing"
    assert release_of(sidecar["config"]) == (3 if kind.startswith("qwen3") else 2)
    assert sidecar["stage"] == "lm" and sidecar["arguments"] == {"source": str(source), "revision": None}


PUBLISHED = {
    "SmolLM2-135M": (
        LlamaConfig(
            **dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9),
            **dict(num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5),
            **dict(tie_word_embeddings=True, bos_token_id=0, eos_token_id=0),
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        ),
        {"head_dim": 64, "qk_norm": False, "rope_theta": 1e5, "rms_norm_eps": 1e-5},
        134_515_008,
    ),
    "Qwen3-0.6B": (
        Qwen3Config(
            **dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
            **dict(num_key_value_heads=8, vocab_size=151936, max_position_embeddings=40960),
            **dict(head_dim=128, rms_norm_eps=1e-6, tie_word_embeddings=True, max_window_layers=28),
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        {"head_dim": 128, "qk_norm": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
        596_049_920,
    ),
}


@pytest.mark.parametrize(("theirs", "expected", "parameters"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_configs_give_models_of_their_size(theirs, expected, parameters):
    config = MiniMindConfig(**from_text_config(theirs))
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
        model.tie_weights()
    alike = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    )
    for name in alike.split():
        assert getattr(config, name) == getattr(theirs, name), name
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.tie_word_embeddings and not config.use_moe
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


# --- tokenizer


CONTROL = ["<|im_start|>", "<|im_end|>", "<|image_pad|>"]
TOKENS = {  # of a kind: how many of these are new, and what pads
    "smollm2": (1, "<|endoftext|>"),
    "qwen3": (0, "<|endoftext|>"),
    "base": (3, "</s>"),
}


@pytest.mark.parametrize(("kind", "added", "pad"), [(k, *v) for k, v in TOKENS.items()], ids=TOKENS)
def test_the_tokenizer_has_what_training_needs_and_keeps_its_ids(bring, tmp_path, kind, added, pad):
    source = write_model(tmp_path / "source", kind)
    assert bring(source) == (0, "")

    before = AutoTokenizer.from_pretrained(source)
    sidecar = json.loads((tmp_path / "out/lm_64.json").read_text())
    assert sidecar["tokenizer"]["path"] == str(tmp_path / "out/lm_64_tokenizer")
    tokenizer = load_tokenizer(sidecar["tokenizer"]["path"])
    check_tokenizer(sidecar, tokenizer, tmp_path)
    known = before.convert_tokens_to_ids(CONTROL[: 3 - added])
    control = tokenizer.convert_tokens_to_ids(CONTROL)
    assert control == [*known, *range(len(before), len(before) + added)]
    config, special = sidecar["config"], [*control[:2], tokenizer.convert_tokens_to_ids(pad)]
    for name, token in zip(("bos", "eos", "pad"), special, strict=True):
        assert getattr(tokenizer, f"{name}_token_id") == config[f"{name}_token_id"] == token
    assert len(tokenizer) == config["vocab_size"] == len(before) + added
    for text in ("It's 1,024 cafés at me@home.org:\n\n  \tok\n", "一只猫和三条狗。", "@@@@"):
        assert tokenizer.encode(text) == before.encode(text, add_special_tokens=False)
    processor = MiniMindVLMProcessor(None, tokenizer, tokens_per_image=4)
    asked = [{"role": "user", "content": "@ <image>\n@@@@"}]
    prompt = processor.encode_prompt(asked, num_images=1)
    assert prompt.count(control[2]) == 4
    assert tokenizer.decode(prompt).count("@") == 5


@pytest.mark.parametrize(
    ("kind", "spare", "rows_added"),
    [("smollm2", 0, 1), ("smollm2", 3, 1), ("qwen3", 5, 0), ("base", 0, 3)],
    ids=["a new row", "a spare row", "rows of no token", "control tokens"],
)
def test_rows_of_the_vocabulary_are_those_of_the_tokens(bring, tmp_path, kind, spare, rows_added):
    source = write_model(tmp_path / "source", kind, spare=spare)
    assert bring(source) == (0, "")

    state = torch.load(tmp_path / "out/lm_64.pth", weights_only=True)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    known = len(AutoTokenizer.from_pretrained(source))
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        rows, before = state[key], theirs[key].half()
        assert len(rows) == known + rows_added and len(before) == known + spare
        assert torch.equal(rows[:known], before[:known])
        mean = before[:known].float().mean(0).expand(rows_added, -1)
        torch.testing.assert_close(rows[known:].float(), mean, atol=1e-4, rtol=1e-3)


def set_template(folder: Path, template: str | None) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"chat_template": template}
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def test_chatml_stays_and_no_thinking_is_asked_for(bring, tmp_path, caplog):
    """What stands before an answer in training stands at the end of a prompt: answers come without it."""
    source = write_model(tmp_path / "source", "qwen3")
    assert bring(source) == (0, "")

    told = "its chat template can ask for thinking: its first line now says that none is wanted"
    assert told in caplog.messages and "bos_token was None, is <|im_start|> now" in caplog.messages
    tokenizer = load_tokenizer(str(tmp_path / "out/lm_64_tokenizer"))
    assert tokenizer.chat_template.endswith(QWEN3_TEMPLATE)
    processor = MiniMindVLMProcessor(None, tokenizer, tokens_per_image=4)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    ids, labels = processor.encode_chat(turns)
    prompt = processor.encode_prompt(turns[:1])
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    learnt = tokenizer.decode([token for token in labels if token >= 0])
    assert learnt == "<think>\n\n</think>\n\nHi<|im_end|>\n"
    options = {"tokenize": True, "add_generation_prompt": True}
    for thinking in ({}, {"enable_thinking": True}):  # which servers say of themselves
        assert processor.apply_chat_template(turns[:1], **options, **thinking) == prompt


def test_a_base_model_without_a_template_gets_ours(bring, tmp_path, caplog):
    source = write_model(tmp_path / "source", "smollm2")
    set_template(source, None)
    assert bring(source) == (0, "")

    assert "it has no chat template: ours goes with it" in caplog.messages
    tokenizer = load_tokenizer(str(tmp_path / "out/lm_64_tokenizer"))
    assert tokenizer.chat_template == (ROOT / "model/tokenizer/chat_template.jinja").read_text()


BEGIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
)
OTHER_TEMPLATES = {
    "Llama 2's": "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endfor %}",
    "Zephyr's": "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    "a token before": "{{ bos_token }}"
    + BEGIN
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "always thinking": BEGIN + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "no prompt": BEGIN,
    "no system turn": "{{ raise_exception('no system turns') if messages[0].role == 'system' }}"
    + BEGIN
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "broken": "{% for m in",
    "not for strings": "{{ 1 + messages[0].content }}",
}


@pytest.mark.parametrize("template", OTHER_TEMPLATES.values(), ids=OTHER_TEMPLATES)
def test_other_templates_are_refused(bring, tmp_path, template):
    source = write_model(tmp_path / "source", "smollm2")
    set_template(source, template)
    code, message = bring(source)
    fails = template in [OTHER_TEMPLATES[name] for name in ("no system turn", "broken", "not for strings")]
    assert code == 1 and message.startswith(f"error: --source {source}: its chat template ")
    assert ("fails: " if fails else "is not ChatML: a prompt ends in ") in message
    assert not (tmp_path / "out").exists()


# --- what is refused


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder: Path, key: str, value: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.state_dict()[key].view(-1)[-1] = value
    model.save_pretrained(folder)


def fill(path: Path, text: str) -> None:
    path.write_text(text)


LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 512}
REFUSED = {
    "another model": ("smollm2", lambda f: edit_config(f, model_type="mistral"), "model_type is 'mistral', "),
    "code of its own": (
        "smollm2",
        lambda f: edit_config(f, model_type="mine", auto_map={"AutoConfig": "mine.C"}),
        "model_type is 'mine', expected one of llama, qwen2_moe, qwen3, qwen3_moe",
    ),
    "quantized": (
        "qwen3",
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "its weights are quantized (gptq), expected plain ones",
    ),
    "a size that is none": (
        "smollm2",
        lambda f: edit_config(f, hidden_size="wide"),
        "config.json makes no model: ",
    ),
    "an unknown activation": (
        "smollm2",
        lambda f: edit_config(f, hidden_act="own"),
        "config.json makes no model: 'own'",
    ),
    "biases": (
        "base",
        lambda f: edit_weights(f, "model.layers.1.self_attn.q_proj.bias", 1.0),
        "model.layers.1.self_attn.q_proj.bias has values that are not zero",
    ),
    "scaled RoPE": ("smollm2", lambda f: edit_config(f, rope_parameters=LLAMA_3), "'rope_type': 'llama3'"),
    "sliding window": (
        "qwen3",
        lambda f: edit_config(
            f, use_sliding_window=True, sliding_window=128, max_window_layers=0, layer_types=None
        ),
        "sliding_window is 128",
    ),
    "partial RoPE": (
        "qwen3",
        lambda f: edit_config(
            f, rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
        ),
        "'partial_rotary_factor': 0.5",
    ),
    "beyond fp16": (
        "smollm2",
        lambda f: edit_weights(f, "model.layers.0.mlp.down_proj.weight", -1e5),
        "model.layers.0.mlp.down_proj.weight has 100000, beyond fp16's 65504",
    ),
    "not a number": (
        "smollm2",
        lambda f: edit_weights(f, "model.norm.weight", float("nan")),
        "model.norm.weight has nan",
    ),
    "no weights": ("smollm2", lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "damaged weights": ("smollm2", lambda f: fill(f / "model.safetensors", "damaged"), "header"),
    "no config": ("smollm2", lambda f: (f / "config.json").unlink(), "config.json"),
    "damaged config": ("smollm2", lambda f: fill(f / "config.json", "{"), "config.json"),
    "no tokenizer": ("smollm2", lambda f: (f / "tokenizer.json").unlink(), "it has no tokenizer.json"),
    "damaged tokenizer": (
        "smollm2",
        lambda f: fill(f / "tokenizer.json", "{"),
        "its tokenizer cannot be read: ",
    ),
    "tokens without rows": (
        "smollm2",
        lambda f: write_model(f, "smollm2", vocab_size=300),
        "its tokenizer has 604 tokens, but vocab_size is 300",
    ),
}


@pytest.mark.parametrize(("kind", "spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_expressed_is_named_in_one_line(bring, tmp_path, kind, spoil, message):
    source = write_model(tmp_path / "source", kind)
    spoil(source)
    code, found = bring(source)
    assert code == 1 and found.startswith(f"error: --source {source}: ")
    assert message in found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["no/such/folder", "two words", ".", ""])
def test_a_source_that_is_nothing_is_told(bring, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    code, message = bring(name)
    assert code == 1 and message.startswith(f"error: --source {name}: ")


def test_a_difference_from_the_source_is_an_error(bring, tmp_path, monkeypatch):
    """Our rotation is spoilt, as it would be by a RoPE that is read wrongly."""
    read_language_model = import_lm.read_language_model

    def spoilt(*arguments):
        model = read_language_model(*arguments)
        model.model.freqs_sin.mul_(1.01)
        return model

    monkeypatch.setattr(import_lm, "read_language_model", spoilt)
    code, message = bring(write_model(tmp_path / "source", "qwen3"))
    assert code == 1 and "from the source, at most 0.0001 is expected" in message
    assert not (tmp_path / "out").exists()


# --- files


def test_what_was_there_is_replaced_as_a_whole(bring, tmp_path):
    first, second = (write_model(tmp_path / kind, kind) for kind in ("base", "qwen3"))
    out, other = tmp_path / "out", tmp_path / "other"
    assert bring(first)[0] == bring(second)[0] == bring(second, other)[0] == 0

    names = {"lm_64.json", "lm_64.pth", "lm_64_tokenizer"}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "lm_64.pth").read_bytes() == (other / "lm_64.pth").read_bytes()
    assert files(out / "lm_64_tokenizer") == files(other / "lm_64_tokenizer")


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_folder_of_something_else_stays(bring, tmp_path, what):
    place = tmp_path / "out/lm_64_tokenizer"
    place.parent.mkdir()
    if what == "folder":
        place.mkdir()
        (place / "mine.txt").write_text("mine")
    else:
        place.write_text("mine")
    code, message = bring(write_model(tmp_path / "source"))
    assert (code, message) == (
        1,
        f"error: {place} is in the way: it is no tokenizer's folder, and stays as it is",
    )
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_a_full_disk_leaves_what_was(bring, tmp_path):
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    assert bring(source)[0] == 0
    before = files(out)

    other = write_model(tmp_path / "other", "qwen3")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code, message = bring(other)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and message.startswith(f"error: cannot write {out / 'lm_64.pth'}: ")
    assert files(out) == before


# --- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """As HF_ENDPOINT, HF_HOME and the script set it before the library is imported."""
    with HubStub() as stub:
        monkeypatch.setattr(constants, "ENDPOINT", stub.endpoint)
        url = stub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield stub


def publish(hub: HubStub, folder: Path) -> None:
    own = {path.name: path.read_bytes() for path in folder.iterdir()}
    useless = {
        "README.md": b"",
        "model.py": b"1 / 0",
        "onnx/model.safetensors": b"other",
        "flax_model.bin": b"",
    }
    hub.models["owner/name"] = own | useless


def test_a_model_of_the_hub_is_fetched_once_and_only_what_is_needed(hub, bring, tmp_path, caplog):
    publish(hub, write_model(tmp_path / "source", "qwen3"))
    needed = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}

    assert bring("owner/name") == (0, "")
    assert sorted(hub.fetched()) == sorted(needed)
    assert bring("owner/name", tmp_path / "again") == (0, "")
    assert sorted(hub.fetched()) == sorted(needed)

    sidecar = json.loads((tmp_path / "out/lm_64.json").read_text())
    assert sidecar["arguments"] == {"source": "owner/name", "revision": COMMIT}
    assert caplog.messages[0].startswith(f"owner/name: revision {COMMIT}, in {tmp_path / 'cache'}")
    assert bring(tmp_path / "source", tmp_path / "local")[0] == 0
    names = [tmp_path / folder / "lm_64.pth" for folder in ("out", "again", "local")]
    assert len({path.read_bytes() for path in names}) == 1


def test_weights_of_the_older_kind_are_fetched_where_there_are_no_others(hub, bring, tmp_path):
    source = write_model(tmp_path / "source")
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    torch.save(state, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    publish(hub, source)

    assert bring("owner/name") == (0, "")
    assert "pytorch_model.bin" in hub.fetched()
    assert bring(source, tmp_path / "local") == (0, "")
    assert (tmp_path / "out/lm_64.pth").read_bytes() == (tmp_path / "local/lm_64.pth").read_bytes()


@pytest.mark.parametrize("what", ["config", "template"])
def test_what_is_refused_is_refused_before_its_weights_are_fetched(hub, bring, tmp_path, what):
    source = write_model(tmp_path / "source")
    edit_config(source, rope_parameters=LLAMA_3) if what == "config" else set_template(source, "other")
    publish(hub, source)
    code, message = bring("owner/name")
    assert code == 1 and message.startswith("error: --source owner/name: ")
    assert "model.safetensors" not in hub.fetched()


@pytest.mark.parametrize("name", ["owner/none", "owner/gated"])
def test_a_model_that_cannot_be_had_is_told_in_one_line(hub, bring, name):
    hub.models["owner/gated"] = {"config.json": b"{}"}
    hub.gated.add("owner/gated")
    code, message = bring(name)
    assert code == 1 and message.startswith(f"error: cannot fetch from {hub.endpoint}: ") and name in message


# --- what an imported model is for


@pytest.mark.parametrize(
    ("kind", "encoder", "formats"),
    [
        ("smollm2", TINY_ENCODER, ["minimind", "llava", "llama"]),
        ("qwen3", SIGLIP, ["minimind", "internvl", "llama"]),
    ],
    ids=["Llama with CLIP", "Qwen3 with SigLIP"],
)
def test_it_is_trained_asked_and_exported(
    run, bring, entry_point, data, tmp_path, caplog, kind, encoder, formats
):
    out = tmp_path / "out"
    assert bring(write_model(tmp_path / "source", kind))[0] == 0
    steps = ["--images_path", data / "images", "--out_dir", out, "--batch_size", 4, "--max_steps", 3]
    steps += ["--num_workers", 0, "--device", "cpu"]
    parts = ["--from_weight", out / "lm_64.pth", "--vision_model_path", encoder]
    run("train_pretrain_vlm.py", *parts, "--data_path", data / "captions.jsonl", *steps)
    run("train_sft_vlm.py", "--data_path", data / "dialogues.jsonl", *steps)
    weight, report = out / "sft_vlm_64.pth", tmp_path / "report.json"
    rows = ["--data_path", data / "captions.jsonl", "--images_path", data / "images"]
    run("eval_vlm.py", "--weight", weight, *rows, "--score", "--report", report, "--device", "cpu")

    learnt, sidecar = load_weights_file(weight)
    before = torch.load(out / "lm_64.pth", weights_only=True)
    assert not torch.equal(learnt[key := "model.layers.1.mlp.up_proj.weight"], before[key])
    assert sidecar["tokenizer"]["path"] == str(out / "lm_64_tokenizer")
    assert sidecar["config"]["image_special_token"].startswith("<|image_pad|>")
    assert json.loads(report.read_text())["n"] == 8
    for name in formats:
        folder = tmp_path / name
        options = ["--weight", weight, "--format", name, "--out", folder]
        assert entry_point(convert_to_hf.main, *options) == (0, "")
    same = [line for line in caplog.messages if line.endswith("from source: 0; greedy text is equal")]
    assert len(same) == len(formats)
    alone = AutoModelForCausalLM.from_pretrained(folder)
    assert type(alone).__name__ == {"smollm2": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == alone.config.vocab_size == sidecar["config"]["vocab_size"]


def test_rows_longer_than_it_was_made_for_are_told_before_training(run, bring, data, tmp_path):
    assert bring(write_model(tmp_path / "source", max_position_embeddings=300))[0] == 0
    flags = ["--from_weight", tmp_path / "out/lm_64.pth", "--vision_model_path", TINY_ENCODER]
    rows = ["--data_path", data / "captions.jsonl", "--images_path", data / "images"]
    result = run("train_pretrain_vlm.py", *flags, *rows, "--out_dir", tmp_path / "out", expect=2)
    assert "error: --max_seq_len must be at most 300, found 640" in result.stderr.splitlines()
