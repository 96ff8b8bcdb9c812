"""The model on a GPU: numbers of the releases, experts, caches, precision, checkpointing."""

import copy

import pytest
import torch
from conftest import GOLDEN, TINY_ENCODER, golden_model

import model.model_minimind
from common.setup import place
from dataset.pixels import Pixels
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
GOLDENS = ["dense", "moe", "v3/dense3", "v3/dense3_yarn", "v3/moe3", "v3/moe3_top2"]


def language_model(device: torch.device, **options) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    lm = MiniMindForCausalLM(MiniMindConfig(**SIZES, vocab_size=128, **options)).to(device)
    with torch.no_grad():  # the initial 0.02 would leave attention and routing nearly uniform
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return lm


def last_logits(name: str, device: torch.device, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Found and expected, of the last 20 tokens of texts with pictures."""
    golden, expected = golden_model(name)
    place(golden, device, dtype)
    ids, pixels = (expected[key].to(device) for key in ("input_ids", "pixel_values"))
    with torch.no_grad(), torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        logits = golden(ids, pixel_values=pixels).logits
    return logits[:, -20:].float().cpu(), expected["logits_last"]


@pytest.mark.parametrize("name", GOLDENS)
def test_logits_are_those_of_the_releases(name, device, exact):
    found, expected = last_logits(name, device, "float32")
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["dense", "v3/dense3"])
def test_bfloat16_stays_near_them(name, device):
    """The mean difference, as a share of the logits' own spread: 0.008 and 0.017 on a CPU."""
    found, expected = last_logits(name, device, "bfloat16")
    assert (found - expected).abs().mean() < 0.035 * expected.std()


@pytest.mark.parametrize("name", ["dense", "v3/moe3"])
def test_parts_of_a_model_may_wait_on_the_cpu(name, device, exact, tmp_path):
    """As accelerate places one that is too large: the tables of RoPE, parts of no layer, stay there."""
    golden, expected = golden_model(name)
    golden.save_pretrained(tmp_path)
    layers = [f"model.layers.{number}" for number in range(golden.config.num_hidden_layers)]
    here = ["model.embed_tokens", *layers[:-1], "vision_proj", "lm_head"]
    places = dict.fromkeys(here, str(device)) | dict.fromkeys(
        ["model.dropout", layers[-1], "model.norm", "vision_encoder"], "cpu"
    )
    placed = MiniMindVLM.from_pretrained(tmp_path, device_map=places).eval()
    with torch.no_grad():
        ids, pixels = (expected[key].to(device) for key in ("input_ids", "pixel_values"))
        found = placed(ids, pixel_values=pixels).logits[:, -20:].cpu()
    torch.testing.assert_close(found, expected["logits_last"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [{}, {"n_shared_experts": 0, "num_experts_per_tok": 1}], ids=["2", "3"])
def test_grouped_experts_are_sliced_ones(device, monkeypatch, options):
    grouped = language_model(device, use_moe=True, **options).model.layers[0].mlp.train()
    sliced = copy.deepcopy(grouped)
    hidden, direction = torch.randn(2, 4, 33, 64, device=device).unbind()
    found = []
    for moe, is_grouped in ((grouped, True), (sliced, False)):
        monkeypatch.setattr(model.model_minimind, "has_grouped_matmul", lambda _, how=is_grouped: how)
        with torch.autocast(device.type, torch.bfloat16):
            output = moe(hidden)[0].float()
        (output * direction).sum().backward()
        found.append((output, *(parameter.grad for parameter in moe.parameters())))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 0.02 * other.norm()


def test_a_gpu_groups_experts_by_itself_in_bfloat16(device):
    states = torch.zeros(8, 64, device=device)
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    with torch.autocast(device.type, torch.bfloat16):
        assert model.model_minimind.has_grouped_matmul(states) == able
    assert not model.model_minimind.has_grouped_matmul(states)


@pytest.mark.parametrize("options", [{}, {"use_moe": True}, {"qk_norm": True}], ids=["dense", "moe", "norms"])
def test_a_static_cache_generates_what_a_dynamic_one_does(device, exact, options):
    lm = language_model(device, **options).eval()
    prompt = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16}
    dynamic = lm.generate(prompt, **settings)
    static = lm.generate(prompt, cache_implementation="static", **settings)
    assert static.tolist() == dynamic.tolist()


def test_checkpointed_activations_give_the_same_gradient(device, exact):
    ids = torch.randint(3, 128, (3, 40), generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for is_checkpointed in (False, True):
        lm = language_model(device).train()
        if is_checkpointed:
            lm.activation_checkpointing_enable()
        loss = lm(ids, labels=ids).loss
        loss.backward()
        found.append((loss.detach(), *(parameter.grad for parameter in lm.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_bytes_become_the_image_processors_values(device):
    _, processor = MiniMindVLM.get_vision_model(TINY_ENCODER)
    noise = torch.randint(0, 256, (90, 70, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = Pixels(processor)
    expected = processor(noise.numpy(), return_tensors="pt")["pixel_values"]
    from PIL import Image

    found = pixels.normalised(pixels(Image.fromarray(noise.numpy()))[None].to(device))
    assert found.device.type == device.type
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=0)


def test_an_encoder_in_bfloat16_gives_nearly_the_same_features(device):
    encoder, _ = MiniMindVLM.get_vision_model(GOLDEN / "clip")
    pixels = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = MiniMindVLM.get_image_embeddings(pixels, encoder)
    found = (
        MiniMindVLM.get_image_embeddings(pixels.to(device), encoder.to(device, torch.bfloat16)).cpu().float()
    )
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean() < 0.02
