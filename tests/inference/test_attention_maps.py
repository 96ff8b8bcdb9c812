"""The map of an answer is the attention that the model computes, compared with softmax(q k) written out."""

import pytest
import torch
from conftest import TINY_ENCODER
from PIL import Image

from common.setup import special_ids
from inference.answers import prepare
from inference.attention_maps import attention_to_patches
from inference.chat import encode_picture
from model.model_vlm import MiniMindVLM, VLMConfig
from model.processing_vlm import MiniMindVLMProcessor


@pytest.fixture(scope="module")
def model(tokenizer) -> MiniMindVLM:
    torch.manual_seed(0)
    config = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    model = MiniMindVLM(VLMConfig(**config, **special_ids(tokenizer)), TINY_ENCODER).eval()
    with torch.no_grad():  # or all weights are nearly equal, and a wrong row would pass
        model.vision_proj.vision_proj[0].weight *= 20
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 20
            layer.self_attn.k_proj.weight *= 20
    return model


def prepared(model, tokenizer, question: str, *colours: str):
    tokens = len(model.config.image_ids)
    processor = MiniMindVLMProcessor(model.processor, tokenizer, tokens_per_image=tokens)
    pictures = [Image.linear_gradient("L").resize((40, 50)).convert("RGB") for _ in colours]
    for picture, colour in zip(pictures, colours, strict=True):
        picture.paste(colour, (0, 0, 20, 20))
    features = {str(i): encode_picture(model, processor, picture) for i, picture in enumerate(pictures)}
    prompt = processor.encode_prompt([{"role": "user", "content": question}], len(colours))
    return prepare(processor, [prompt], [list(features)], features)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


@torch.no_grad()
def plain_weights(model, inputs, new_ids) -> torch.Tensor:
    """Every layer's and head's weights (L, H, S, S) over prompt and answer, S tokens, by the textbook."""
    ids = torch.cat([inputs["input_ids"][0], new_ids])
    seen = (
        {name: inputs[name] for name in ("image_features", "image_counts")}
        if "image_counts" in inputs
        else {}
    )
    hidden = model.model.embed_tokens(ids)  # (S, C)
    if seen:
        projected = model.vision_proj(inputs["image_features"][0]).flatten(0, 1)  # (I * P, C)
        hidden[ids == 34] = projected
    rope = model.model.freqs_cos[: len(ids)], model.model.freqs_sin[: len(ids)]
    layers = []
    for layer in model.model.layers:
        attention, states = layer.self_attn, layer.input_layernorm(hidden)
        heads = []
        for head in range(4):
            rows, shared = slice(head * 8, head * 8 + 8), slice(head // 2 * 8, head // 2 * 8 + 8)
            query = rotate(states @ attention.q_proj.weight[rows].T, *rope)  # (S, D)
            key = rotate(states @ attention.k_proj.weight[shared].T, *rope)
            scores = query @ key.T / 8**0.5 + torch.full((len(ids), len(ids)), -torch.inf).triu(1)
            heads.append((scores.softmax(-1), states @ attention.v_proj.weight[shared].T))
        hidden = (
            hidden + torch.cat([weights @ value for weights, value in heads], -1) @ attention.o_proj.weight.T
        )
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        layers.append(torch.stack([weights for weights, _ in heads]))
    logits = model(ids[None], **seen).logits[0]
    torch.testing.assert_close(model.lm_head(model.model.norm(hidden)), logits, rtol=1e-4, atol=1e-4)
    return torch.stack(layers)


def test_the_map_is_softmax_of_q_times_k_and_text_has_the_rest(model, tokenizer):
    inputs = prepared(model, tokenizer, "<image> or <image>?", "red", "blue")
    new_ids = torch.tensor([300, 17, 4000, 52, 2])
    found = attention_to_patches(model, inputs, new_ids)
    assert (found.shape, found.dtype) == ((5, 2, 196), torch.float32)

    first = inputs["input_ids"].shape[1] - 1  # the position that chooses the first new token
    rows = plain_weights(model, inputs, new_ids)[:, :, first : first + 5].mean((0, 1))  # (N, S)
    is_patch = torch.cat([inputs["input_ids"][0] == 34, torch.zeros(5, dtype=torch.bool)])
    torch.testing.assert_close(found.flatten(1), rows[:, is_patch], rtol=1e-4, atol=1e-6)
    total = found.sum((1, 2)) + rows[:, ~is_patch].sum(1)
    torch.testing.assert_close(total, torch.ones(5))
    assert found[0].max() > 3 * found[0].mean(), "a flat map would not tell rows and patches apart"
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_the_map_has_a_weight_for_each_token_that_pixel_shuffle_leaves(tokenizer):
    torch.manual_seed(0)
    config = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    config |= special_ids(tokenizer) | {"pixel_shuffle": 2}
    model = MiniMindVLM(VLMConfig(**config), TINY_ENCODER).eval()
    inputs = prepared(model, tokenizer, "<image> or <image>?", "red", "blue")
    found = attention_to_patches(model, inputs, torch.tensor([300, 17]))
    assert found.shape == (2, 2, 49)
    is_token = inputs["input_ids"][0] == 34
    assert is_token.sum() == 98 and inputs["image_features"].shape == (1, 2, 196, 64)
    looked = model(inputs["input_ids"], output_attentions=True, **only_images(inputs)).attentions[0]
    expected = looked[0, :, -1, is_token].mean(0).view(2, 49)  # of the last prompt token: it chose the first
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-6)


def only_images(inputs) -> dict:
    return {name: inputs[name] for name in ("image_features", "image_counts")}


def test_the_map_of_a_model_in_half_precision_is_fp32(model, tokenizer):
    """Also as numbers: its weights of a row add up as they do in fp32, but for what bfloat16 rounds."""
    inputs = prepared(model, tokenizer, "What?", "red")
    new_ids = torch.tensor([300, 17, 2])
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_to_patches(model, inputs, new_ids)
    assert found.dtype == torch.float32
    shares = found.sum((1, 2)), attention_to_patches(model, inputs, new_ids).sum((1, 2))
    torch.testing.assert_close(*shares, rtol=0.02, atol=0.02)


def test_a_later_token_changes_nothing_before_it(model, tokenizer):
    inputs = prepared(model, tokenizer, "What?", "red")
    whole = attention_to_patches(model, inputs, torch.tensor([300, 17, 4000]))
    torch.testing.assert_close(attention_to_patches(model, inputs, torch.tensor([300])), whole[:1])
    other = attention_to_patches(model, inputs, torch.tensor([300, 18, 4000]))
    torch.testing.assert_close(other[:2], whole[:2])
    assert not torch.allclose(other[2], whole[2])


def test_without_pictures_or_tokens_the_map_is_empty(model, tokenizer):
    text, seen = prepared(model, tokenizer, "Hello?"), prepared(model, tokenizer, "What?", "red")
    assert attention_to_patches(model, text, torch.tensor([300, 2])).shape == (2, 0, 196)
    assert attention_to_patches(model, seen, torch.tensor([], dtype=torch.long)).shape == (0, 1, 196)


def test_one_prompt_without_padding_is_expected(model, tokenizer):
    inputs = prepared(model, tokenizer, "What?", "red")
    inputs["attention_mask"][0, 0] = 0
    with pytest.raises(ValueError, match="one prompt without padding"):
        attention_to_patches(model, inputs, torch.tensor([300]))
