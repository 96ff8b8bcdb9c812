"""The VLM: where images go, the frozen encoder, generation, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_VIT, save_dinov2
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BitImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig, load_weights, pixel_shuffled

GOLDEN = ROOT / "tests/golden"
CLIP = GOLDEN / "clip"
TINY = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=1024,
)
P = 196
AT = 34
# Tied, random weights repeat one token forever; without repetition every step depends on the whole ranking.
GREEDY = dict(do_sample=False, eos_token_id=None, no_repeat_ngram_size=1, suppress_tokens=[0])
close = dict(atol=1e-4, rtol=0)


def build(**options) -> MiniMindVLM:
    torch.manual_seed(0)
    vlm = MiniMindVLM(VLMConfig(**(TINY | options)), vision_model_path=CLIP).eval()
    with torch.no_grad():  # the initial 0.02 would leave images without much influence
        for name, parameter in vlm.named_parameters():
            if parameter.dim() > 1 and not name.startswith("vision_encoder"):
                parameter.mul_(5)
    return vlm


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def vlm(request):
    return build(use_moe=request.param)


@pytest.fixture(scope="module")
def dense():
    return build()


def text(seed: int, length: int) -> list[int]:
    return torch.randint(40, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_images(count: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(seed))


def mixed_batch() -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Rows with 0, 1 and 3 images (two of them side by side), their slots, and the numbers of real ones."""
    rows = [
        text(1, 9),
        [*text(2, 4), *[AT] * P, *text(3, 5)],
        [*text(4, 2), *[AT] * 2 * P, *text(5, 3), *[AT] * P, *text(6, 4)],
    ]
    pixel_values = torch.full((3, 3, 3, 224, 224), float("nan"))  # what is no image must never be looked at
    images = random_images(4)
    pixel_values[1, 0] = images[0]
    pixel_values[2] = images[1:]
    return rows, pixel_values, torch.tensor([0, 1, 3])


def pad(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = [torch.tensor(row) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side)
    ones = [torch.ones_like(row) for row in tensors]
    return ids, torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)


def alone(row: list[int], pixel_values: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.tensor([row])}
    return inputs | ({"pixel_values": pixel_values[None, :count]} if count else {})


def test_features_replace_the_placeholders(dense):
    row = [*text(1, 3), *[AT] * P, *text(2, 2)]
    images = random_images(1)
    features = dense.get_image_embeddings(images, dense.vision_encoder)
    embedded = dense.model.embed_tokens(torch.tensor([row]))
    embedded[0, 3 : 3 + P] = dense.vision_proj(features)[0]
    expected = dense(inputs_embeds=embedded).logits
    torch.testing.assert_close(dense(torch.tensor([row]), pixel_values=images[None]).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_batch_equals_single_rows(vlm, side):
    rows, pixel_values, counts = mixed_batch()
    ids, mask = pad(rows, side)
    logits = vlm(ids, attention_mask=mask, pixel_values=pixel_values, image_counts=counts).logits
    for index, row in enumerate(rows):
        expected = vlm(**alone(row, pixel_values[index], counts[index])).logits[0]
        torch.testing.assert_close(logits[index, mask[index].bool()], expected, **close)


def test_all_accepted_shapes_agree(dense):
    ids = torch.tensor([[*text(1, 3), *[AT] * P, *text(2, 2)]] * 2)
    images = random_images(2)
    expected = dense(ids, pixel_values=images[:, None]).logits
    features = dense.get_image_embeddings(images, dense.vision_encoder)
    assert features.shape == (2, P, 64)
    for inputs in (
        dict(pixel_values=images),
        dict(pixel_values=images[:, None, None]),
        dict(pixel_values=images[:, None], image_counts=torch.tensor([1, 1])),
        dict(image_features=features[:, None]),
        dict(image_features=features[:, None], pixel_values=images[:, None] * 0),
    ):
        torch.testing.assert_close(dense(ids, **inputs).logits, expected)


def test_only_real_slots_are_encoded(dense, monkeypatch):
    rows, pixel_values, counts = mixed_batch()
    seen = []
    encode = dense.vision_encoder.forward
    monkeypatch.setattr(
        dense.vision_encoder,
        "forward",
        lambda pixel_values, **options: seen.append(len(pixel_values)) or encode(pixel_values, **options),
    )
    ids, mask = pad(rows, "right")
    dense(ids, attention_mask=mask, pixel_values=pixel_values, image_counts=counts)
    assert seen == [4]


def test_a_short_run_of_at_signs_is_text(dense):
    row = [AT, *text(1, 3), *[AT] * P, 50, *[AT] * (P - 1), 51]
    images = random_images(1)
    logits = dense(torch.tensor([row]), pixel_values=images[None]).logits
    embedded = dense.model.embed_tokens(torch.tensor([row]))
    features = dense.get_image_embeddings(images, dense.vision_encoder)
    embedded[0, 4 : 4 + P] = dense.vision_proj(features)[0]
    torch.testing.assert_close(logits, dense(inputs_embeds=embedded).logits)


def test_without_images_nothing_is_replaced(dense):
    ids = torch.tensor([[*text(1, 3), *[AT] * (P + 1)]])
    embedded = dense.model.embed_tokens(ids)
    torch.testing.assert_close(dense(ids).logits, dense(inputs_embeds=embedded).logits)


def test_batch_without_real_images_keeps_the_projection_in_the_graph(dense):
    ids = torch.tensor([text(1, 5), text(2, 5)])
    inputs = dict(pixel_values=torch.zeros(2, 0, 3, 224, 224), image_counts=torch.tensor([0, 0]))
    output = dense(ids, **inputs, labels=ids)
    torch.testing.assert_close(output.logits, dense(ids).logits)
    dense.zero_grad()
    output.loss.backward()
    assert not dense.vision_proj.vision_proj[0].weight.grad.any()


@pytest.mark.parametrize(
    ("row", "slots", "count", "message"),
    [
        ([50, *[AT] * P, 51], 2, 2, "row 1: 1 runs of 196 .* 2 images"),
        ([50, *[AT] * P, 51, *[AT] * P], 1, 1, "row 1: 2 runs of 196 .* 1 images"),
        ([50, 51], 1, 1, "row 1: 0 runs of 196 .* 1 images"),
        ([50, *[AT] * P, 51], 1, 0, "row 1: 1 runs of 196 .* 0 images"),
        ([50, *[AT] * (P + 1), 51], 1, 1, "row 1: a run of 197 "),
        ([50, *[AT] * (2 * P + 4), 51], 2, 2, "row 1: a run of 396 "),
        ([50, *[AT] * P, 51], 1, 2, "image_counts"),
    ],
    ids=["more_images", "more_runs", "no_run", "no_image", "broken", "broken_double", "too_few_slots"],
)
def test_runs_and_images_must_agree(dense, row, slots, count, message):
    ids, mask = pad([text(1, 4), row], "right")
    features = torch.zeros(2, slots, P, 64)
    with pytest.raises(ValueError, match=message):
        dense(ids, attention_mask=mask, image_features=features, image_counts=torch.tensor([0, count]))


def test_features_of_another_encoder_are_refused(dense):
    ids = torch.tensor([[*text(1, 3), *[AT] * P]])
    with pytest.raises(ValueError, match=r"\(36, 128\), expected \(196, 64\)"):
        dense(ids, image_features=torch.zeros(1, 1, 36, 128))


def test_count_vision_proj(dense):
    ids = torch.tensor([[*text(1, 3), *[AT] * P]])
    hidden = torch.zeros(1, 3 + P, 64)
    features = torch.randn(1, 1, P, 64)
    result = dense.count_vision_proj(ids, hidden, features)
    torch.testing.assert_close(result[0, 3:], dense.vision_proj(features)[0, 0])
    assert not result[0, :3].any()
    assert dense.count_vision_proj(ids, hidden) is hidden


@pytest.mark.parametrize("cache", [None, "static", False], ids=["dynamic", "static", "uncached"])
def test_generation_of_a_mixed_batch_equals_row_by_row(vlm, cache):
    rows, pixel_values, counts = mixed_batch()
    ids, mask = pad(rows, "left")
    options = dict(max_new_tokens=5, **GREEDY)
    how = dict(use_cache=False) if cache is False else dict(cache_implementation=cache)
    together = vlm.generate(
        ids, attention_mask=mask, pixel_values=pixel_values, image_counts=counts, **how, **options
    )
    for index, row in enumerate(rows):
        single = vlm.generate(**alone(row, pixel_values[index], counts[index]), **options)
        assert together[index, -5:].tolist() == single[0, -5:].tolist()


@pytest.mark.parametrize(
    "options", [dict(num_beams=3), dict(num_beams=2, num_return_sequences=2)], ids=["beams", "returned"]
)
def test_beams_of_a_mixed_batch_equal_row_by_row(dense, options):
    rows, pixel_values, counts = mixed_batch()
    ids, mask = pad(rows, "left")
    options = dict(max_new_tokens=4, **GREEDY) | options
    together = dense.generate(
        ids, attention_mask=mask, pixel_values=pixel_values, image_counts=counts, **options
    ).view(3, -1, ids.shape[1] + 4)
    for index, row in enumerate(rows):
        single = dense.generate(**alone(row, pixel_values[index], counts[index]), **options)
        assert together[index, :, -4:].tolist() == single[:, -4:].tolist()


def test_sampling_repeats_with_the_seed_and_encodes_once(dense, monkeypatch):
    rows, pixel_values, counts = mixed_batch()
    ids, mask = pad(rows, "left")
    calls = []
    encode = dense.get_image_embeddings
    monkeypatch.setattr(dense, "get_image_embeddings", lambda *inputs: calls.append(1) or encode(*inputs))

    def sample():
        torch.manual_seed(3)
        inputs = dict(attention_mask=mask, pixel_values=pixel_values, image_counts=counts)
        return dense.generate(ids, **inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2)

    first = sample()
    assert len(calls) == 1
    assert torch.equal(first, sample())


def test_only_the_first_step_is_given_images(dense):
    ids = torch.tensor([[50, *[AT] * P]])
    images = dict(image_features=torch.zeros(1, 1, P, 64), image_counts=torch.tensor([1]))
    prepare = dense.prepare_inputs_for_generation
    assert images.keys() <= prepare(ids, is_first_iteration=True, use_cache=True, **images).keys()
    assert images.keys() <= prepare(ids, is_first_iteration=False, use_cache=False, **images).keys()
    assert not images.keys() & prepare(ids, is_first_iteration=False, use_cache=True, **images).keys()


def test_generation_from_features(dense):
    row = [*text(1, 3), *[AT] * P, *text(2, 2)]
    images = random_images(1)
    options = dict(max_new_tokens=4, **GREEDY)
    features = dense.get_image_embeddings(images, dense.vision_encoder)[None]
    assert torch.equal(
        dense.generate(torch.tensor([row]), image_features=features, **options),
        dense.generate(torch.tensor([row]), pixel_values=images[None], **options),
    )


def test_parameter_count_and_projection_without_encoder():
    vlm = MiniMindVLM(vision_model_path=None)
    assert vlm.vision_encoder is None
    assert sum(parameter.numel() for parameter in vlm.parameters()) == 26_223_616
    assert vlm.vision_proj.vision_proj[0].weight.shape == (512, 768)
    with pytest.raises(ValueError, match="without a vision encoder"):
        vlm(torch.tensor([[AT] * P]), pixel_values=torch.zeros(1, 1, 3, 224, 224))


def test_encoder_is_frozen_and_in_eval_mode_whatever_train_says():
    vlm = build()
    before = {name: value.clone() for name, value in vlm.vision_encoder.state_dict().items()}
    vlm.train()
    assert vlm.training and vlm.vision_proj.training and not vlm.vision_encoder.training
    assert not any(parameter.requires_grad for parameter in vlm.vision_encoder.parameters())
    optimizer = torch.optim.AdamW(vlm.parameters(), lr=1e-2)
    ids = torch.tensor([[*text(1, 3), *[AT] * P, *text(2, 2)]])
    vlm(ids, pixel_values=random_images(1)[None], labels=ids).loss.backward()
    optimizer.step()
    assert vlm.vision_proj.vision_proj[0].weight.grad.any()
    assert all(torch.equal(before[name], value) for name, value in vlm.vision_encoder.state_dict().items())


def test_encoder_ignores_autocast(dense):
    images = random_images(2)
    expected = dense.get_image_embeddings(images, dense.vision_encoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = dense.get_image_embeddings(images, dense.vision_encoder)
    assert features.dtype == torch.float32
    assert torch.equal(features, expected)


def test_forward_under_autocast_stays_close(dense):
    ids = torch.tensor([[*text(1, 3), *[AT] * P, *text(2, 2)]])
    images = random_images(1)[None]
    expected = dense(ids, pixel_values=images).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = dense(ids, pixel_values=images).logits
    torch.testing.assert_close(logits.float(), expected, atol=0.2, rtol=0.1)


def save_encoder(folder: Path, encoder, size: int) -> Path:
    encoder.save_pretrained(folder)
    settings = json.loads((CLIP / "preprocessor_config.json").read_text())
    settings |= {"size": {"height": size, "width": size}, "do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


SIGLIP_VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=96,
    patch_size=16,
)
SIGLIP_TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
)


@pytest.mark.parametrize("whole", [True, False], ids=["two_towers", "vision_only"])
def test_siglip_has_no_class_token_to_drop(tmp_path, whole):
    torch.manual_seed(0)
    vision = SiglipVisionConfig(**SIGLIP_VISION)
    if whole:
        saved = SiglipModel(SiglipConfig(vision_config=SIGLIP_VISION, text_config=SIGLIP_TEXT))
    else:
        saved = SiglipVisionModel(vision)
    folder = save_encoder(tmp_path / "siglip", saved, 96)
    vlm = MiniMindVLM(VLMConfig(**TINY), vision_model_path=folder).eval()
    assert vlm.config.image_ids == [AT] * 36 and vlm.config.image_special_token == "@" * 36
    assert vlm.vision_proj.vision_proj[0].weight.shape == (64, 32)
    pixels = vlm.image2tensor(Image.new("RGB", (80, 50), "teal"), vlm.processor)
    features = vlm.get_image_embeddings(pixels, vlm.vision_encoder)
    expected = vlm.vision_encoder(pixels).last_hidden_state
    assert features.shape == (1, 36, 32)
    torch.testing.assert_close(features, expected)
    original = dict(saved.named_parameters())
    prefix = "vision_model." if whole else ""
    for name, parameter in vlm.vision_encoder.named_parameters():
        assert torch.equal(parameter, original[prefix + name])
    assert vlm(torch.tensor([[50, *[AT] * 36]]), pixel_values=pixels[None]).logits.shape == (1, 37, 128)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_gives_the_patches_of_its_preprocessing(tmp_path, registers):
    vlm = MiniMindVLM(VLMConfig(**TINY), save_dinov2(tmp_path / "dinov2", registers)).eval()
    assert vlm.config.image_ids == [AT] * 16 and vlm.config.image_special_token == "@" * 16
    pixels = vlm.image2tensor(Image.radial_gradient("L"), vlm.processor)
    assert pixels.shape == (1, 3, 56, 56)
    features = vlm.get_image_embeddings(pixels, vlm.vision_encoder)
    expected = vlm.vision_encoder(pixels).last_hidden_state
    assert expected.shape == (1, 1 + registers + 16, 32)
    assert torch.equal(features, expected[:, 1 + registers :])


def test_a_saved_model_knows_the_patches_that_its_encoders_config_does_not(tmp_path):
    vlm = MiniMindVLM(VLMConfig(**TINY), save_dinov2(tmp_path / "dinov2", 4)).eval()
    vlm.save_pretrained(tmp_path / "saved")
    loaded = MiniMindVLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.image_ids == [AT] * 16
    ids = torch.tensor([[50, *[AT] * 16, 51]])
    pixels = vlm.image2tensor(Image.radial_gradient("L"), vlm.processor)
    torch.testing.assert_close(
        loaded(ids, pixel_values=pixels).logits, vlm(ids, pixel_values=pixels).logits, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("patches", "size", "r", "expected"),
    [
        (16, None, 2, [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]),
        (18, (3, 6), 3, [[0, 1, 2, 6, 7, 8, 12, 13, 14], [3, 4, 5, 9, 10, 11, 15, 16, 17]]),
        (8, (4, 8), 2, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (4, (1, 4), 1, [[0], [1], [2], [3]]),
    ],
    ids=["square", "oblong", "oblong_smaller_than_the_config", "one"],
)
def test_neighbouring_patches_become_one_token_row_by_row(patches, size, r, expected):
    config = ViTConfig(image_size=size, patch_size=1) if size else None
    numbers = torch.arange(patches, dtype=torch.float32)[None, :, None]  # (images, P, W)
    features = torch.cat([numbers, numbers + 1000, -numbers]).repeat(1, 1, 2)
    tokens = pixel_shuffled(features, r, config)
    assert tokens.shape == (3, patches // r**2, 2 * r**2)
    assert tokens[:, :, ::2].equal(tokens[:, :, 1::2])  # a patch's own values stay side by side
    assert tokens[0, :, ::2].tolist() == expected
    assert tokens[1, :, ::2].equal(tokens[0, :, ::2] + 1000) and tokens[2].equal(-tokens[0])
    assert pixel_shuffled(features[:0], r, config).shape == (0, *tokens.shape[1:])


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_pixel_shuffle_makes_49_tokens_of_196_patches(projector):
    vlm = build(projector=projector, pixel_shuffle=2)
    assert vlm.config.image_ids == [AT] * 49 and vlm.config.image_special_token == "@" * 49
    first = next(vlm.vision_proj.parameters())
    assert first.shape == ((64, 4 * 64) if projector == "linear" else (4 * 64,))
    row = torch.tensor([[*text(1, 3), *[AT] * 98, *text(2, 2)]])
    images = random_images(2)
    features = vlm.get_image_embeddings(images, vlm.vision_encoder)  # (2, 196, 64)
    grid = features.view(2, 14, 14, 64)
    squares = [grid[:, y : y + 2, x : x + 2].reshape(2, -1) for y in range(0, 14, 2) for x in range(0, 14, 2)]
    embedded = vlm.model.embed_tokens(row)
    embedded[0, 3:101] = vlm.vision_proj(torch.stack(squares, 1)).flatten(0, 1)
    expected = vlm(inputs_embeds=embedded).logits
    torch.testing.assert_close(vlm(row, pixel_values=images[None]).logits, expected)
    torch.testing.assert_close(vlm(row, image_features=features[None]).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantized_projection_gets_features_in_the_models_dtype(dtype):
    """Its weights are integers in rows of another length, as bitsandbytes packs them."""

    class Packed(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.scale, self.shape = linear.weight.abs().max() / 127, linear.weight.shape
            integers = (linear.weight / self.scale).round().to(torch.int8).view(-1, 1)
            self.weight = torch.nn.Parameter(integers, requires_grad=False)

        def forward(self, features):
            return features @ (self.weight.view(self.shape) * self.scale).T.to(features)

    vlm = build().to(dtype)
    row, images = torch.tensor([[*text(1, 3), *[AT] * P, *text(2, 3)]]), random_images(1)[None]
    expected = vlm(row, pixel_values=images).logits
    vlm.vision_proj.vision_proj[0] = Packed(vlm.vision_proj.vision_proj[0])
    found = vlm(row, pixel_values=images).logits
    blank = vlm(row, pixel_values=images * 0).logits
    assert (found - expected).abs().max() < 0.1 * (blank - expected).abs().max()


def test_pixel_shuffle_takes_rows_without_pictures_and_names_other_features():
    vlm = build(pixel_shuffle=2).train()
    none = torch.zeros(1, 0, 3, 224, 224)
    ids = torch.tensor([text(1, 5)])
    vlm(ids, pixel_values=none, labels=ids).loss.backward()
    assert not vlm.vision_proj.vision_proj[0].weight.grad.any()
    row = torch.tensor([[AT] * 49])
    message = r"image features have shape (49, 256), expected (196, 64)"
    with pytest.raises(ValueError, match=re.escape(message)):
        vlm(row, image_features=torch.zeros(1, 1, 49, 256))


def test_pixel_shuffle_1_is_what_was_before_the_field(dense, tmp_path):
    vlm = build(pixel_shuffle=1)
    row, images = torch.tensor([[*text(1, 3), *[AT] * P]]), random_images(1)[None]
    assert torch.equal(vlm(row, pixel_values=images).logits, dense(row, pixel_values=images).logits)
    vlm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("pixel_shuffle") == 1
    (tmp_path / "config.json").write_text(json.dumps(config))  # as older exports have it
    old = MiniMindVLM.from_pretrained(tmp_path)
    assert old.config.pixel_shuffle == 1
    assert torch.equal(old(row, pixel_values=images).logits, dense(row, pixel_values=images).logits)


def test_a_saved_model_has_its_pixel_shuffle(tmp_path):
    vlm = MiniMindVLM(VLMConfig(**TINY, pixel_shuffle=2), save_dinov2(tmp_path / "dinov2", 4)).eval()
    vlm.save_pretrained(tmp_path / "saved")
    loaded = MiniMindVLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.pixel_shuffle == 2 and loaded.config.image_ids == [AT] * 4
    ids = torch.tensor([[50, *[AT] * 4, 51]])
    pixels = vlm.image2tensor(Image.radial_gradient("L"), vlm.processor)
    assert torch.equal(loaded(ids, pixel_values=pixels).logits, vlm(ids, pixel_values=pixels).logits)


@pytest.mark.parametrize(
    ("make", "grid", "r"),
    [
        (lambda folder: VLMConfig(**TINY, pixel_shuffle=4, vision_config=CLIPVisionConfig()), "7 x 7", 4),
        (lambda folder: build(pixel_shuffle=4), "14 x 14", 4),
        (lambda folder: MiniMindVLM(VLMConfig(**TINY, pixel_shuffle=5), save_dinov2(folder)), "4 x 4", 5),
        (lambda folder: MiniMindVLM(VLMConfig(**TINY, pixel_shuffle=2), oblong(folder)), "4 x 2", 2),
    ],
    ids=["config", "encoder", "preprocessing", "another_shape_than_the_configs"],
)
def test_a_grid_that_pixel_shuffle_does_not_divide_is_named(tmp_path, make, grid, r):
    message = f"pixel_shuffle {r}: found a grid of {grid} patches, expected one of its config's shape, with"
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "encoder")


def oblong(folder: Path) -> Path:
    """An encoder of pictures that are twice as high as wide, which its config does not say."""
    save_dinov2(folder)
    BitImageProcessorPil(crop_size={"height": 56, "width": 28}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("r", [0, -1])
def test_pixel_shuffle_is_at_least_1(r):
    with pytest.raises(ValueError, match=f"pixel_shuffle is {r}, expected 1 or more"):
        VLMConfig(**TINY, pixel_shuffle=r)


def save_vit(folder: Path, size: int = 70, without: str = "", **preprocessing) -> Path:
    """A random ViT, and its preprocessing; weights whose names begin with `without` are left out."""
    torch.manual_seed(0)
    ViTModel(ViTConfig(**TINY_VIT)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": size, "width": size}, **preprocessing).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not (without and name.startswith(without))}
    assert not without or len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_encoder_may_lack_a_pooler(tmp_path):
    whole, _ = MiniMindVLM.get_vision_model(save_vit(tmp_path / "whole"))
    torch.manual_seed(7)  # whatever the library puts in place of the pooler is the same in every process
    lacking, processor = MiniMindVLM.get_vision_model(save_vit(tmp_path / "lacking", without="pooler."))
    assert not any(parameter.any() for parameter in lacking.pooler.parameters())
    pixels = MiniMindVLM.image2tensor(Image.radial_gradient("L"), processor)
    features = MiniMindVLM.get_image_embeddings(pixels, lacking)
    assert features.shape == (1, 25, 32)
    assert torch.equal(features, MiniMindVLM.get_image_embeddings(pixels, whole))
    assert not any(parameter.requires_grad for parameter in lacking.parameters())


def test_a_siglip_may_lack_its_head(tmp_path):
    folder = save_encoder(tmp_path / "siglip", SiglipVisionModel(SiglipVisionConfig(**SIGLIP_VISION)), 96)
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "head." not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    encoder, _ = MiniMindVLM.get_vision_model(folder)
    assert torch.equal(
        encoder.state_dict()["embeddings.patch_embedding.weight"],
        weights[next(name for name in weights if name.endswith("embeddings.patch_embedding.weight"))],
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: save_vit(folder, size=84), "Input image size (84*84) doesn't match model (70*70)"),
        (lambda folder: save_vit(folder, without="layernorm."), "its weights lack layernorm.bias, ..."),
        (
            lambda folder: save_vit(folder, without="embeddings.cls"),
            "its weights lack embeddings.cls_token, ...",
        ),
        (
            lambda folder: save_vit(folder, do_resize=False),
            "its preprocessing makes pictures of (3, 48, 64) and (3, 64, 48)",
        ),
        (
            lambda folder: save_encoder(folder, swin(), 32),
            "the encoder gave 16 tokens for an image of 64 patches",
        ),
    ],
    ids=["other_size", "no_layernorm", "no_class_token", "shapes_of_pictures", "merged_patches"],
)
def test_an_encoder_that_pictures_do_not_pass_is_refused_when_it_is_loaded(tmp_path, make, message):
    folder = make(tmp_path / "encoder")
    expected = f"^{re.escape(f'{folder} is not a usable vision encoder: {message}')}"
    with pytest.raises(ValueError, match=expected) as error:
        MiniMindVLM(VLMConfig(**TINY), folder)
    assert "\n" not in str(error.value)


def swin() -> SwinModel:
    return SwinModel(SwinConfig(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2))


@pytest.mark.parametrize(
    ("said", "told"),
    [("", "AssertionError"), ("\n", "AssertionError"), ("\none\ntwo", "one")],
    ids=["nothing", "blank", "two_lines"],
)
def test_what_the_library_says_of_an_encoder_is_told_in_one_line(monkeypatch, said, told):
    def broken(*_, **__):
        raise AssertionError(said)

    monkeypatch.setattr("model.model_vlm.AutoModel.from_pretrained", broken)
    with pytest.raises(ValueError, match=f"^{re.escape(str(CLIP))} is not a usable vision encoder: {told}$"):
        MiniMindVLM.get_vision_model(CLIP)


def test_half_precision_vision_only_clip_becomes_fp32(tmp_path):
    encoder, _ = MiniMindVLM.get_vision_model(CLIP)
    assert isinstance(encoder, CLIPVisionModel)
    folder = save_encoder(tmp_path / "clip", encoder.half(), 224)
    loaded, _ = MiniMindVLM.get_vision_model(folder)
    assert loaded.dtype == torch.float32
    for one, other in zip(encoder.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one.float(), other)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_image_of_any_mode_becomes_a_tensor(dense, mode):
    image = Image.new("RGB", (300, 200), "orange").convert(mode)
    assert dense.image2tensor(image, dense.processor).shape == (1, 3, 224, 224)


def test_transparency_of_a_tensors_image_is_white(dense):
    image = Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    white = dense.image2tensor(Image.new("RGB", (300, 200), "white"), dense.processor)
    assert torch.equal(dense.image2tensor(image, dense.processor), white)


def test_missing_encoder_names_the_download_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options in (dict(vision_model_path=tmp_path / "nowhere"), {}):
        with pytest.raises(FileNotFoundError, match=r"python scripts/download.py clip"):
            MiniMindVLM(VLMConfig(**TINY), **options)


@pytest.mark.parametrize(
    "content", ["nothing", "language_model", "broken_json", "no_weights", "no_processor"]
)
def test_folder_that_is_no_encoder_is_named(tmp_path, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    if content == "language_model":
        LlamaConfig().save_pretrained(folder)
    elif content == "broken_json":
        (folder / "config.json").write_text("{")
    elif content == "no_weights":
        shutil.copy(CLIP / "config.json", folder)
    elif content == "no_processor":
        shutil.copytree(CLIP, folder, dirs_exist_ok=True)
        (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=str(folder)) as error:
        MiniMindVLM.get_vision_model(folder)
    assert "\n" not in str(error.value)
    if content == "language_model":
        assert "'llama'" in str(error.value)


def test_save_and_load_with_the_encoder_inside(vlm, tmp_path, monkeypatch):
    vlm.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(MiniMindVLM, "get_vision_model", None)
    loaded = MiniMindVLM.from_pretrained(tmp_path / "saved")
    expected = vlm.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded.model.freqs_cos, vlm.model.freqs_cos)
    assert torch.equal(loaded.model.freqs_sin, vlm.model.freqs_sin)
    assert not any(parameter.requires_grad for parameter in loaded.vision_encoder.parameters())
    assert loaded.config.vision_config.to_dict() == vlm.config.vision_config.to_dict()
    ids, images = torch.tensor([[*text(1, 3), *[AT] * P, *text(2, 2)]]), random_images(1)[None]
    expected_logits = vlm(ids, pixel_values=images).logits
    torch.testing.assert_close(loaded(ids, pixel_values=images).logits, expected_logits, atol=1e-5, rtol=0)


def test_save_and_load_without_encoder(tmp_path):
    MiniMindVLM(VLMConfig(**TINY), vision_model_path=None).save_pretrained(tmp_path)
    loaded = MiniMindVLM.from_pretrained(tmp_path)
    assert loaded.vision_encoder is None


def test_saved_config_says_everything_and_no_path(dense, tmp_path):
    dense.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "minimind-v"
    assert config["rope_theta"] == 1e6
    assert config["tie_word_embeddings"] is True
    assert config["image_ids"] == [AT] * P
    assert config["vision_config"]["model_type"] == "clip_vision_model"
    assert str(CLIP) not in (tmp_path / "config.json").read_text()


def test_explicit_path_wins_over_the_config():
    config = VLMConfig(**TINY, vision_config=SiglipVisionConfig(**SIGLIP_VISION).to_dict())
    assert MiniMindVLM(config).config.image_ids == [AT] * 36
    vlm = MiniMindVLM(config, vision_model_path=CLIP)
    assert vlm.config.vision_config.model_type == "clip_vision_model"
    assert vlm.config.image_ids == [AT] * P


def test_load_weights_takes_old_and_half_precision_files(dense):
    state_dict = {
        name: value.half()
        for name, value in dense.state_dict().items()
        if not name.startswith("vision_encoder.") and name != "lm_head.weight"
    }
    state_dict |= {"pos_cis": torch.zeros(3), "model.layers.0.self_attn.mask": torch.zeros(1)}
    target = build()
    load_weights(target, state_dict)
    assert target.dtype == torch.float32
    assert target.lm_head.weight is target.model.embed_tokens.weight
    assert torch.equal(target.model.norm.weight, dense.model.norm.weight)
    assert torch.equal(target.lm_head.weight, dense.lm_head.weight.half().float())


def test_load_weights_names_what_does_not_fit(dense):
    weights = {k: v for k, v in dense.state_dict().items() if not k.startswith("vision_encoder.")}
    missing = {k: v for k, v in weights.items() if k != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"model\.norm\.weight is missing"):
        load_weights(build(), missing)
    with pytest.raises(ValueError, match=r"model\.extra is unexpected"):
        load_weights(build(), weights | {"model.extra": torch.zeros(1)})
    wrong = weights | {"model.norm.weight": torch.zeros(32)}
    with pytest.raises(ValueError, match=r"norm\.weight has shape \(32,\), expected \(64,\)"):
        load_weights(build(), wrong)


def test_vlm_starts_from_a_language_model():
    lm = MiniMindForCausalLM(MiniMindConfig(**TINY))
    vlm = build()
    projection = vlm.vision_proj.vision_proj[0].weight.clone()
    with pytest.raises(ValueError, match=r"vision_proj\.vision_proj\.0\.bias is missing"):
        load_weights(vlm, lm.state_dict())
    load_weights(vlm, lm.state_dict(), allow_missing=("vision_proj.",))
    assert torch.equal(vlm.lm_head.weight, lm.lm_head.weight)
    assert torch.equal(vlm.vision_proj.vision_proj[0].weight, projection)
