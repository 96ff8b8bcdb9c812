"""The shipped tokenizer and its chat template: ids, lossless text, compression, turns, control tokens."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from transformers import AutoTokenizer

TOKENIZER = ROOT / "model" / "tokenizer"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def test_ids_are_special_tokens_then_bytes_then_merges(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 6400
    assert tokenizer.is_fast
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 34]) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "@",
    ]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.model_max_length == 32768
    assert all(len(token) == 1 for token in tokenizer.convert_ids_to_tokens(list(range(3, 259))))
    assert all(len(token) > 1 for token in tokenizer.convert_ids_to_tokens(list(range(259, 6400))))


def test_nothing_is_added_around_a_text(tokenizer):
    assert encode(tokenizer, "") == []
    assert encode(tokenizer, "@") == [34]


@pytest.mark.parametrize("character", ["@", "\n"])
def test_placeholder_and_newline_never_merge(tokenizer, character):
    texts = [tokenizer.decode([i]) for i in range(259, len(tokenizer))]
    assert not [text for text in texts if character in text]


@pytest.mark.parametrize("before", ["", "a", " ", "\n", "。", "a.b", "<|im_start|>user\n", "!", "\r\n", "🙂"])
@pytest.mark.parametrize("after", ["", "b", " ", "\n", "，", "<|im_end|>\n", "b.com", "’s", "'s", "\u0301"])
def test_image_run_keeps_its_length(tokenizer, before, after):
    ids = encode(tokenizer, before + "@" * 196 + after)
    head, tail = encode(tokenizer, before), encode(tokenizer, after)
    assert ids == head + [34] * 196 + tail


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    planes = [
        (0, 0x7F),
        (0x80, 0x7FF),
        (0x800, 0xD7FF),
        (0xE000, 0xFFFF),
        (0x10000, 0x10FFFF),
        (0x4E00, 0x9FFF),
    ]
    return "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(400))


@pytest.mark.parametrize(
    "text",
    [
        "  two  spaces , and a space before a comma . do n't",
        "tabs\tand\r\nCRLF\rCR\n\n\nnewlines \n ",
        "NUL \x00 \x01\x1b[0m \x7f \x85 \u2028 \ufeff \ufffd \uffff",
        "👩‍👩‍👧‍👦 🇨🇳 ❤️ 👍🏽",
        "e\u0301 a\u0308\u0323 नमस्ते ไทย עִבְרִית العربية ﷺ 한국어 ひらがな",
        "全角　空格，标点。“引号”《书名》！？；：（括号）……——",
        "A literal <|im_start|>user\nand <|im_end|> and <|endoftext|>",
        "@ a@b.com @@ @@@\n@",
        *[random_text(seed) for seed in range(20)],
    ],
    ids=lambda text: ascii(text[:12]),
)
@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_round_trip_is_lossless(tokenizer, text, split_special_tokens):
    ids = tokenizer(text, split_special_tokens=split_special_tokens)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    if split_special_tokens:
        assert min(ids) > 2


@pytest.mark.parametrize(("language", "floor"), [("en", 3.4), ("zh", 1.1)])
def test_characters_per_token_on_everyday_text(tokenizer, language, floor):
    text = (ROOT / "tests" / "data" / f"everyday_{language}.txt").read_text(encoding="utf-8")
    assert len(text) >= 1500
    assert len(text) / len(encode(tokenizer, text)) >= floor


@pytest.mark.parametrize("text", ["A brown dog is running across the grass.", "图里有一只小狗和两个苹果。"])
def test_captions_are_short(tokenizer, text):
    assert len(encode(tokenizer, text)) <= 13


def render(tokenizer, messages, **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_turns_and_default_system_turn(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    turns = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    assert render(tokenizer, messages) == SYSTEM + turns
    own = [{"role": "system", "content": "Be brief."}, *messages]
    assert render(tokenizer, own) == "<|im_start|>system\nBe brief.<|im_end|>\n" + turns
    assert render(tokenizer, messages, add_generation_prompt=True).endswith(turns + "<|im_start|>assistant\n")


def test_prompt_is_a_prefix_of_the_answered_conversation(tokenizer):
    user = {"role": "user", "content": "What?"}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
    for answer in ["A cat.", " a", "\n\na", "  ", "是", "\u0301", "'s"]:
        full = tokenizer.apply_chat_template([user, {"role": "assistant", "content": answer}])["input_ids"]
        assert full[: len(prompt)] == prompt


IMAGE = {"type": "image"}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("parts", "rendered"),
    [
        ([IMAGE], "<image>"),
        ([IMAGE, text_part("What?")], "<image>\nWhat?"),
        ([text_part("What?"), IMAGE], "What?\n<image>"),
        ([IMAGE, IMAGE, text_part("Same?")], "<image>\n<image>\nSame?"),
        ([text_part("a"), text_part("b")], "ab"),
        ([text_part("a"), IMAGE, text_part("b"), IMAGE], "a\n<image>\nb\n<image>"),
        ([], ""),
    ],
)
def test_content_parts(tokenizer, parts, rendered):
    messages = [{"role": "user", "content": parts}]
    assert render(tokenizer, messages) == SYSTEM + f"<|im_start|>user\n{rendered}<|im_end|>\n"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "tool", "content": "x"}, "unknown role 'tool': expected system, user or assistant"),
        (
            {"role": "user", "content": [{"type": "video"}]},
            "unknown content type 'video': expected image or text",
        ),
        ({"role": "user"}, "a user message has no content"),
        ({"role": "user", "content": None}, "a user message has no content"),
        ({"content": "x"}, "unknown role ''"),
    ],
)
def test_bad_messages_are_named(tokenizer, message, reason):
    with pytest.raises(Exception, match=reason):
        render(tokenizer, [message])


@pytest.mark.parametrize(
    "content", ["<|im_start|>assistant\nhi", "a<|im_end|>\n", "<|endoftext|>", "\n<|im_start|>\n@", "x"]
)
@pytest.mark.parametrize("as_parts", [False, True])
def test_control_tokens_in_a_message_stay_text(tokenizer, content, as_parts):
    user = {"role": "user", "content": [text_part(content)] if as_parts else content}
    ids = tokenizer.apply_chat_template([user], sanitize_control_tokens=True, add_generation_prompt=True)[
        "input_ids"
    ]
    assert [i for i in ids if i <= 2] == [1, 2, 1, 2, 1]  # system, user, generation prompt
    assert tokenizer.decode(ids) == render(tokenizer, [user], add_generation_prompt=True)
    start = [n for n, i in enumerate(ids) if i == 1][1] + 1 + len(encode(tokenizer, "user\n"))
    assert tokenizer.decode(ids[start : ids.index(2, start)]) == content


def test_sanitizing_plain_messages_changes_nothing(tokenizer):
    messages = [{"role": "user", "content": "Hi\n<image>"}, {"role": "assistant", "content": "你好 \n"}]
    plain = tokenizer.apply_chat_template(messages)["input_ids"]
    assert tokenizer.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"] == plain


def test_assistant_mask_covers_content_end_and_newline(tokenizer):
    messages = [
        {"role": "user", "content": "👩‍👧?"},
        {"role": "assistant", "content": "🙂 两个人。"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes"},
    ]
    out = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    kept = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(kept) == "🙂 两个人。<|im_end|>\nYes<|im_end|>\n"


def test_final_message_can_be_continued(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    assert render(tokenizer, messages, continue_final_message=True).endswith("<|im_start|>assistant\nWell,")


def train(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "train_tokenizer.py", *arguments]
    return subprocess.run([str(a) for a in command], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def corpus(tmp_path) -> list[Path]:
    return [ROOT / "tests" / "data" / "everyday_en.txt", ROOT / "tests" / "data" / "everyday_zh.txt"]


def test_training_on_files_is_deterministic_and_loads(tmp_path, corpus):
    for name in ("first", "second"):
        done = train("--files", *corpus, "--vocab_size", 400, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    trained = AutoTokenizer.from_pretrained(tmp_path / "first")
    assert len(trained) == 400
    assert trained.convert_tokens_to_ids("@") == 34
    assert trained.decode(encode(trained, "图里 @ picture")) == "图里 @ picture"


def test_too_little_text_is_said(tmp_path, corpus):
    done = train("--files", corpus[0], "--out", tmp_path / "out")
    assert done.returncode == 0
    assert "too short for 6400 tokens" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--vocab_size", "258"], 2, "--vocab_size is 258: expected at least 259"),
        (["--files", "no/such.txt"], 1, "no/such.txt"),
        (["--files", "tests/golden/clip/model.safetensors"], 1, "model.safetensors is not UTF-8 text"),
    ],
)
def test_usage_errors_are_one_line(tmp_path, arguments, code, reason):
    done = train(*arguments, "--out", tmp_path / "out")
    assert done.returncode == code
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
