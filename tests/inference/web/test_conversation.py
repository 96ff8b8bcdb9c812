"""What a conversation refuses, what it keeps, and the pictures beside it."""

import time
from pathlib import Path

import pytest
import torch
from conftest import TINY_ENCODER
from PIL import Image

from common.setup import build_vlm
from inference.chat import Sampling, stream_answer
from inference.trained import load_vlm
from inference.web.conversation import MAX_IMAGES, MAX_TOKENS, Conversation, Refused, draw_attention
from inference.web.texts import TEXTS, text


@pytest.fixture(scope="module")
def loaded(weight):
    return load_vlm(str(weight))


def answer(loaded, conversation: Conversation, text: str, *files, dtype: str = "float32") -> str:
    sampling = Sampling(temperature=0, max_new_tokens=30)
    return "".join(conversation.answer(*loaded, text, [str(file) for file in files], "", sampling, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_conversation_goes_on_and_knows_where_it_looked(loaded, world, dtype):
    conversation = Conversation()
    red = world / "images/red.png"
    assert answer(loaded, conversation, "What colour is this?", red, dtype=dtype) == "It is red."
    assert answer(loaded, conversation, "And in one word?", dtype=dtype) == "red"
    assert [turn["content"] for turn in conversation.turns] == [
        "<image>\nWhat colour is this?",
        "It is red.",
        "And in one word?",
        "red",
    ]
    attention, tokens = conversation.look(*loaded, dtype)
    assert "".join(tokens) == "red" and attention.shape == (len(tokens), 1, 196)
    drawn = draw_attention(conversation.seen[0], attention[0, 0], float(attention.max()))
    assert drawn.getcolors(maxcolors=10) is None, "nothing is drawn over the plain picture"
    assert conversation.seen[0].getpixel((100, 100)) == (255, 0, 0)


def test_a_square_of_patches_that_are_one_token_is_drawn_as_one(world, tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model, processor = build_vlm(sizes | {"pixel_shuffle": 7}, str(TINY_ENCODER), tokenizer)
    conversation = Conversation()
    answer((model.eval(), processor), conversation, "What colour is this?", world / "images/red.png")
    attention, tokens = conversation.look(model, processor, "float32")
    assert attention.shape == (len(tokens), 1, 4)
    top_left = draw_attention(conversation.seen[0], torch.tensor([1.0, 0, 0, 0]), 1.0)
    width, height = top_left.size
    assert len({top_left.getpixel((x, y)) for x in (5, width // 5) for y in (5, height // 5)}) == 1
    assert sum(top_left.getpixel((5, 5))) > sum(top_left.getpixel((width - 5, height - 5))) + 100


def test_what_cannot_be_answered_leaves_the_conversation_as_it_was(loaded, world, tmp_path):
    red, broken = world / "images/red.png", tmp_path / "broken.png"
    broken.write_bytes(red.read_bytes()[:50])
    conversation = Conversation()
    answer(loaded, conversation, "What colour is this?", red)
    before = list(conversation.turns), list(conversation.shown), list(conversation.features)
    for reason, question, files in [
        ("empty", "  ", []),
        ("too_many", "What?", [red] * MAX_IMAGES),
        ("no_picture", "What?", [red, broken]),
        ("too_long", "word " * MAX_TOKENS, []),
        ("refused", "<image>", []),
    ]:
        with pytest.raises(Refused) as refused:
            answer(loaded, conversation, question, *files)
        assert refused.value.reason == reason
        assert text(reason, accept_language="zh-CN", **refused.value.details)
        assert (conversation.turns, conversation.shown) == before[:2]
        assert len(conversation.features) == len(before[2])


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> list[Path]:
    """Black pictures of 64 megapixels in 8 KB each."""
    path = tmp_path_factory.mktemp("large") / "black.png"
    Image.new("1", (8000, 8000)).save(path)
    return [path] * MAX_IMAGES


@pytest.mark.parametrize(
    ("reason", "question", "pictures"),
    [
        ("too_large", "What?", 1),
        ("too_large", "What?", MAX_IMAGES),
        ("too_much_text", "word " * 2_000_000, 0),
    ],
    ids=["a picture", "eight pictures", "10 MB of text"],
)
def test_what_would_take_long_is_refused_at_once(reason, question, pictures, loaded, large):
    conversation = Conversation()
    began = time.perf_counter()
    with pytest.raises(Refused, match=reason) as refused:
        answer(loaded, conversation, question, *large[:pictures])
    assert time.perf_counter() - began < 1
    assert text(reason, accept_language="zh-CN", **refused.value.details)
    assert state(conversation) == (0, 0, 0, 0)


def test_as_many_photographs_as_a_conversation_takes_are_taken_at_once(loaded, tmp_path):
    """96 megapixels, but JPEGs are decoded small."""
    photograph = tmp_path / "photograph.jpg"
    Image.new("RGB", (4000, 3000), "red").save(photograph)
    conversation = Conversation()
    answer(loaded, conversation, "What?", *[photograph] * MAX_IMAGES)
    assert len(conversation.features) == MAX_IMAGES


def test_a_long_system_prompt_counts_as_text(loaded):
    pieces = Conversation().answer(*loaded, "Hm?", [], "word " * 2_000_000, Sampling())
    with pytest.raises(Refused, match="too_much_text"):
        next(pieces)


def test_what_fits_in_tokens_is_never_too_much_text(loaded):
    """By the longest token: nothing has more characters to the token."""
    tokenizer = loaded[1].tokenizer
    longest = max((tokenizer.decode([token]) for token in range(len(tokenizer))), key=len)
    assert answer(loaded, Conversation(), longest * (MAX_TOKENS - 200)) is not None
    with pytest.raises(Refused, match="too_long"):
        answer(loaded, Conversation(), longest * MAX_TOKENS)


def test_a_picture_is_opened_and_preprocessed_once(loaded, world, monkeypatch):
    opened, preprocess = [], loaded[1].pixel_values
    monkeypatch.setattr(loaded[1], "pixel_values", lambda images: opened.append(images) or preprocess(images))
    conversation = Conversation()
    assert answer(loaded, conversation, "What colour is this?", world / "images/red.png") == "It is red."
    assert len(opened) == 1 and conversation.seen[0].getpixel((100, 100)) == (255, 0, 0)


def state(conversation: Conversation) -> tuple[int, ...]:
    parts = conversation.turns, conversation.shown, conversation.features, conversation.seen
    return tuple(map(len, parts))


def test_a_turn_that_nobody_saw_or_that_failed_was_not_asked(loaded, world, monkeypatch):
    conversation = Conversation()
    answer(loaded, conversation, "What colour is this?", world / "images/red.png")
    before = state(conversation)
    asked = dict(text="And this?", files=[str(world / "images/blue.png")], system="", sampling=Sampling())
    pieces = conversation.answer(*loaded, **asked)
    assert next(pieces) == "" and state(conversation) == (4, 6, 2, 2)
    pieces.close()
    assert state(conversation) == before

    def fail(**_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(loaded[0], "generate", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(conversation.answer(*loaded, **asked))
    assert state(conversation) == before
    with pytest.raises(Refused, match="no_answer"):
        conversation.look(*loaded)
    assert answer(loaded, conversation, "And in one word?") == "red"


def test_an_answer_can_be_given_up_before_its_first_word(loaded, monkeypatch):
    """Which may be long in coming: here it comes only when somebody gives up."""

    def wait(stopping_criteria, **_):
        while not bool(stopping_criteria(torch.zeros(1, 1), None)):
            time.sleep(0.01)
        return torch.zeros(1, 0, dtype=torch.long)

    monkeypatch.setattr(loaded[0], "generate", wait)
    pieces = stream_answer(*loaded, [{"role": "user", "content": "Hm?"}], [], Sampling())
    assert [next(pieces) for _ in range(3)] == ["", "", ""]
    pieces.close()


def test_without_an_answer_about_a_picture_there_is_nothing_to_look_at(loaded):
    conversation = Conversation()
    answer(loaded, conversation, "你好吗？")
    with pytest.raises(Refused, match="no_answer"):
        conversation.look(*loaded)


def test_attention_is_drawn_where_it_is():
    weights = torch.zeros(4)
    weights[1] = 0.5  # the patch at the top right
    drawn = draw_attention(Image.new("RGB", (96, 96), "gray"), weights, most=0.5)
    width, height = drawn.size
    bright, dark = drawn.getpixel((width - 20, 20)), drawn.getpixel((20, height - 20))
    assert sum(bright) > sum(dark) + 100


def test_attention_is_drawn_over_pictures_that_are_not_square():
    weights = torch.zeros(8)  # 2 rows of 4 patches
    weights[7] = 0.5
    drawn = draw_attention(Image.new("RGB", (128, 64), "gray"), weights, most=0.5)
    width, height = drawn.size
    assert sum(drawn.getpixel((width - 20, height - 20))) > sum(drawn.getpixel((width - 20, 20))) + 100


def test_both_languages_say_the_same_things():
    assert TEXTS["en"].keys() == TEXTS["zh"].keys()
    assert text("new", accept_language="zh-TW,en;q=0.5") == "新对话"
    assert text("new", accept_language="de,zh;q=0.5") == text("new", accept_language=None) == "New chat"
