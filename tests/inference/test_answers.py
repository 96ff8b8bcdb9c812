"""Which questions a file asks, how answers are scored, and that batches change no answer."""

import pytest
import torch
from conftest import TINY_ENCODER
from datasets import Dataset
from PIL import Image

from common.setup import special_ids
from dataset.errors import DataError
from dataset.rows import FEATURES, normalise_row
from inference.answers import SPARE_TOKENS, encode_pictures, greedy_answers, questions_of
from inference.scoring.accuracy import score
from model.model_vlm import MiniMindVLM, VLMConfig
from model.processing_vlm import MiniMindVLMProcessor


def questions(*rows: dict, images_path: str = "pictures"):
    clean = [normalise_row(row, f"test.jsonl:{i}") for i, row in enumerate(rows, start=1)]
    return questions_of(Dataset.from_list(clean, features=FEATURES), images_path)


def turns(*contents: str) -> list[dict]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def test_each_assistant_turn_is_asked_after_the_turns_before_it():
    conversation = turns("What?\n<image>", "A cat.\n", "Sure?", " Yes. ")
    first, second = questions({"image": "a.png", "kind": "what", "conversations": conversation})
    assert first.messages == conversation[:1]
    assert second.messages == conversation[:3]
    assert [first.text, second.text] == ["What?", "Sure?"]
    assert [first.expected, second.expected] == ["A cat.", "Yes."]
    assert [first.kind, second.kind] == ["what", "what"]
    assert first.images == second.images == ["pictures/a.png"]
    assert first.where == "test.jsonl:1"


def test_a_question_has_only_the_pictures_shown_so_far():
    marked = turns("One: <image>", "1", "Two: <image> <image>", "2")
    unmarked = turns("Both?", "1", "Really?", "2")
    found = questions(
        {"image": "a.png, b.png, c.png", "conversations": marked},
        {"image": ["a.png", "/abs/b.png"], "conversations": unmarked},
    )
    assert [question.images for question in found] == [
        ["pictures/a.png"],
        ["pictures/a.png", "pictures/b.png", "pictures/c.png"],
        ["pictures/a.png", "/abs/b.png"],
        ["pictures/a.png", "/abs/b.png"],
    ]


def test_rows_without_a_users_question_ask_nothing():
    unasked = [{"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Hello."}]
    assert questions({"text": "plain"}, {"conversations": unasked}, {"conversations": turns("Hm.")}) == []


def test_score_is_exact_match_of_stripped_answers_by_kind():
    asked = questions(
        {"kind": "count", "conversations": turns("a", "Two.")},
        {"kind": "count", "conversations": turns("b", "Two.")},
        {"kind": "count", "conversations": turns("c", "One.")},
        {"conversations": turns("d", "Red.")},
    )
    report = score(asked, ["Two.", " Two.\n", "one.", "Red."])
    assert report["n"] == 4
    assert report["accuracy"] == 3 / 4
    assert report["by_kind"] == {
        "(none)": {"accuracy": 1.0, "n": 1},
        "count": {"accuracy": 2 / 3, "n": 3},
    }
    assert report["mean_over_kinds"] == pytest.approx(5 / 6)
    assert report["majority"]["accuracy"] == 3 / 4
    assert report["majority"]["by_kind"]["count"] == {"accuracy": 2 / 3, "n": 3, "answer": "Two."}
    assert [row["correct"] for row in report["questions"]] == [True, True, False, True]


@pytest.fixture(scope="module")
def random_model(tokenizer):
    torch.manual_seed(0)
    config = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = MiniMindVLM(VLMConfig(**config, **special_ids(tokenizer)), TINY_ENCODER).eval()
    with torch.no_grad():  # so that pictures and words decide the answer, not the last token alone
        model.vision_proj.vision_proj[0].weight *= 20
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 20
    return model, MiniMindVLMProcessor(
        model.processor, tokenizer, tokens_per_image=len(model.config.image_ids)
    )


def test_answers_do_not_depend_on_batches_or_order(random_model, data):
    model, processor = random_model
    rows = [
        {"conversations": turns("Hello?", "A long expected answer, longer than the others.")},
        {"image": "0.png", "conversations": turns("What is this?", "A cat.", "And what is it doing?", "Ja.")},
        {"image": "1.png,2.png,3.png", "conversations": turns("<image> or <image>?", "x", "<image>!", "y")},
        {"image": "0.png", "conversations": turns("这是什么？", "一只猫。")},
        {"image": "4.png", "conversations": turns("What is this?", "A cat.")},
    ]
    asked = questions(*rows, images_path=str(data / "images"))
    singly = dict(greedy_answers(model, processor, asked, batch_size=1))
    assert len(set(singly.values())) > 3, "a model that says the same to everything would prove nothing"
    assert dict(greedy_answers(model, processor, asked, batch_size=3)) == singly
    backwards = dict(greedy_answers(model, processor, asked[::-1], batch_size=32))
    assert [backwards[len(asked) - 1 - i] for i in range(len(asked))] == [
        singly[i] for i in range(len(asked))
    ]


def test_an_answer_is_what_the_model_itself_continues_with(random_model, data):
    model, processor = random_model
    conversation = turns("What is this?", "A cat.")
    (asked,) = questions({"image": "1.png", "conversations": conversation}, images_path=str(data / "images"))
    with Image.open(data / "images/1.png") as picture:
        inputs = processor.batch([processor.encode_prompt(conversation[:1], 1)], [[picture]])
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    answer, tokens = dict(greedy_answers(model, processor, [asked], batch_size=4))[0]
    assert answer.startswith(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert tokens == len(processor.tokenizer.encode("A cat.", add_special_tokens=False)) + SPARE_TOKENS


def test_a_picture_is_encoded_once(random_model, data, monkeypatch):
    model, processor = random_model
    encoded = []
    encode = model.vision_encoder.forward
    monkeypatch.setattr(
        model.vision_encoder,
        "forward",
        lambda **kwargs: encoded.append(len(kwargs["pixel_values"])) or encode(**kwargs),
    )
    conversation = turns("What?", "A cat.", "Sure?", "Yes.", "Really?", "Yes, a cat.")
    rows = [{"image": f"{i}.png", "conversations": conversation} for i in (0, 1)]
    asked = questions(*rows, images_path=str(data / "images"))
    dict(greedy_answers(model, processor, asked, batch_size=4))
    assert encoded == [2]


def test_blank_pictures_are_mid_grey_and_keep_their_size(random_model, data, monkeypatch):
    model, processor = random_model
    seen = []
    pixel_values = processor.pixel_values
    monkeypatch.setattr(
        processor, "pixel_values", lambda pictures: seen.extend(pictures) or pixel_values(pictures)
    )
    rows = [{"image": f"{i}.png", "conversations": turns("What?", "A cat.")} for i in (0, 3)]
    asked = questions(*rows, images_path=str(data / "images"))
    encode_pictures(model, processor, asked, batch_size=1, blank=True)
    assert [picture.size for picture in seen] == [(60, 40), (60, 43)]
    assert all(picture.getcolors() == [(60 * picture.height, (128, 128, 128))] for picture in seen)


def test_an_unreadable_picture_names_row_and_file(random_model, tmp_path):
    model, processor = random_model
    (tmp_path / "a.png").write_bytes(b"no picture")
    asked = questions(
        {"image": "a.png", "conversations": turns("What?", "A cat.")}, images_path=str(tmp_path)
    )
    with pytest.raises(DataError, match=r"test.jsonl:1: cannot read image .*a\.png"):
        encode_pictures(model, processor, asked)
