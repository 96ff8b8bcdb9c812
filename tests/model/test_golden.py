"""Parity with the published release, in numbers recorded from it (tests/golden/README.md)."""

import pytest
import torch
from conftest import golden_model

RELEASE_3 = "dense3 dense3_headdim dense3_yarn dense3_yarn_short moe3 moe3_top1_raw moe3_top2 moe3_top2_raw"


@pytest.fixture(scope="module", params=["dense", "moe", *(f"v3/{name}" for name in RELEASE_3.split())])
def golden(request):
    return golden_model(request.param)


def test_logits_with_images(golden):
    model, expected = golden
    with torch.no_grad():
        logits = model(expected["input_ids"], pixel_values=expected["pixel_values"]).logits
    torch.testing.assert_close(logits[:, -20:], expected["logits_last"], atol=1e-4, rtol=0)


def test_text_logits(golden):
    model, expected = golden
    with torch.no_grad():
        logits = model(expected["input_ids"][:, -20:]).logits
    torch.testing.assert_close(logits, expected["text_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_greedy_continuation(golden, use_cache):
    model, expected = golden
    prompt = expected["input_ids"]
    output = model.generate(
        prompt,
        pixel_values=expected["pixel_values"],
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=12,
        min_new_tokens=12,
        eos_token_id=None,
        use_cache=use_cache,
    )
    assert output[:, prompt.shape[1] :].tolist() == expected["greedy"].tolist()


def test_loss(golden):
    model, expected = golden
    if "loss" not in expected:
        pytest.skip("not recorded")
    with torch.no_grad():
        loss = model(
            expected["input_ids"], pixel_values=expected["pixel_values"], labels=expected["labels"]
        ).loss
    torch.testing.assert_close(loss, expected["loss"], atol=1e-5, rtol=0)


def test_auxiliary_loss_in_training(golden):
    model, expected = golden
    if "aux_loss_train" not in expected:
        pytest.skip("dense")
    model.train()
    aux_loss = model(expected["input_ids"], pixel_values=expected["pixel_values"]).aux_loss
    model.eval()
    torch.testing.assert_close(aux_loss, expected["aux_loss_train"], atol=1e-5, rtol=0)
