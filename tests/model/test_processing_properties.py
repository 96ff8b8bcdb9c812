"""What holds whatever is said in a conversation: prompts and labels under both releases' templates, and under
those of language models of others."""

import itertools
import re
import unicodedata

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from language_models import write_tokenizer
from release3 import make_tokenizer
from transformers import AutoTokenizer

from model.processing_vlm import IGNORE_INDEX, IMAGE_MARKER, MiniMindVLMProcessor
from scripts.import_lm import add_tokens, read_tokenizer, set_template

TOKENS = 4  # that stand for an image
PIECES = [
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_start|>assistant\n",
        "<think>",
        "</think>",
        "<image>",
    ),
    *(
        "@",
        "@@@",
        "<|image_pad|>",
        "\n",
        " ",
        "user\n",
        "a",
        "A deer.",
        "\u9e7f",
        "\ue000",
        "\U000f0000",
        "{{ 1 }}",
    ),
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=6).map("".join)
TEXTS = TEXTS.filter(lambda text: "@" * TOKENS not in text and "\r" not in text)
ASKED = TEXTS.map(lambda text: text.replace(IMAGE_MARKER, "")).filter(lambda text: "@" * TOKENS not in text)
ANSWERS = TEXTS.filter(str.strip)
RULES = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,  # the same on every machine
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def conversations(draw) -> tuple[list[dict], int]:
    """Messages, and how many images they show: as many as users' turns have markers,
    or any number without a marker."""
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        asked = [draw(ASKED) for _ in range(draw(st.integers(1, 3)))]
        messages.append({"role": "user", "content": IMAGE_MARKER.join(asked)})
        messages.append({"role": "assistant", "content": draw(ANSWERS)})
    markers = sum(m["content"].count(IMAGE_MARKER) for m in messages if m["role"] == "user")
    return messages, markers or draw(st.integers(0, 2))


@pytest.fixture(scope="module", params=["release 2", "release 3", "smollm2", "qwen3"])
def processor(request, tmp_path_factory) -> MiniMindVLMProcessor:
    if request.param == "release 2":
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "model/tokenizer")
    elif request.param == "release 3":
        tokenizer = make_tokenizer()
    else:
        folder = tmp_path_factory.mktemp(request.param)
        write_tokenizer(folder, request.param)
        add_tokens(tokenizer := read_tokenizer(folder))
        set_template(tokenizer)
    return MiniMindVLMProcessor(None, tokenizer, tokens_per_image=TOKENS)


def encoded(processor, conversation) -> tuple[list[dict], list[int], list[int]]:
    messages, images = conversation
    return messages, *processor.encode_chat(messages, images)


def text_of(processor, ids: list[int]) -> str:
    text = processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return unicodedata.normalize("NFC", text)  # as Qwen3's tokenizer does before anything else


def learnt_of(processor, ids: list[int], labels: list[int]) -> list[list[int]]:
    """The ids of each run of supervised tokens."""
    groups = itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORE_INDEX)
    return [[token for token, _ in run] for is_learnt, run in groups if is_learnt]


def expected_answer(processor, content: str, is_last: bool) -> str:
    """An answer as it is learnt. The template of release 3 splits reasoning off, or writes an empty block;
    that of Qwen3 does so for the last answer, and leaves reasoning out of those before."""
    content = content.lstrip("\n")
    if "<think>" not in processor.tokenizer.added_tokens_encoder:
        return content
    found = re.fullmatch(r"\s*<think>\n*(.*?)\n*</think>\n*(.*)", content, re.DOTALL)
    reasoning, answer = found.groups() if found else ("", content)
    is_left_out = "enable_thinking" in processor.chat_template and not is_last
    return answer if is_left_out else f"<think>\n{reasoning}\n</think>\n\n{answer}"


@RULES
@given(conversation=conversations())
def test_what_is_learnt_is_each_answer_with_its_end(processor, conversation):
    messages, ids, labels = encoded(processor, conversation)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    expected = [
        unicodedata.normalize("NFC", f"{expected_answer(processor, text, i == len(answers))}<|im_end|>\n")
        for i, text in enumerate(answers, start=1)
    ]
    found = [text_of(processor, run) for run in learnt_of(processor, ids, labels)]
    assert found == expected
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))


@RULES
@given(conversation=conversations())
def test_runs_of_placeholders_are_as_many_as_pictures(processor, conversation):
    _, ids, _ = encoded(processor, conversation)
    runs = [len([*run]) for token, run in itertools.groupby(ids) if token == processor.placeholder_id]
    assert sum(length // TOKENS for length in runs) == conversation[1]
    assert all(length % TOKENS == 0 for length in runs if length >= TOKENS)


@RULES
@given(conversation=conversations())
def test_no_text_opens_or_closes_a_turn(processor, conversation):
    messages, ids, _ = encoded(processor, conversation)
    tokenizer = processor.tokenizer
    opened, closed = ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)
    asked = processor.encode_prompt([{"role": "user", "content": "?"}])
    has_default = messages[0]["role"] != "system" and asked.count(tokenizer.bos_token_id) == 3
    assert opened == closed == len(messages) + has_default


@RULES
@given(conversation=conversations())
def test_a_prompt_is_what_stands_before_the_last_answer(processor, conversation):
    messages, ids, _ = encoded(processor, conversation)
    prompt = processor.encode_prompt(messages[:-1], conversation[1])
    begun = prompt[: len(prompt) - prompt[::-1].index(processor.tokenizer.bos_token_id)]
    assert ids[: len(begun)] == begun
