"""Features on disk: equal to the encoder's, made once, noticed when picture or encoder change."""

import pickle
from pathlib import Path

import pytest
import torch
from conftest import TINY_ENCODER

from common.setup import build_vlm, place
from dataset.collate import StepDataset
from dataset.errors import DataError
from dataset.feature_cache import FeatureCache, _to_stored, encode_missing
from dataset.vlm_dataset import VLMDataset
from trainer.learner import model_inputs

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def vlm(tokenizer):
    torch.manual_seed(0)
    return build_vlm(SIZES, str(TINY_ENCODER), tokenizer)


@pytest.fixture
def items(data):
    return [(str(data / f"images/{i}.png"), f"rows.jsonl:{i}") for i in range(8)]


def filled(folder, vlm, items, dtype="float16"):
    cache = FeatureCache(folder, *vlm, dtype)
    encode_missing(cache, *vlm, items)
    cache.check_complete()
    return cache


def test_batches_with_features_give_the_loss_of_batches_with_pixels(data, tmp_path, vlm):
    model, processor = vlm
    rows = [data / "dialogues.jsonl"], processor, 1024, data / "images"
    samples = VLMDataset(*rows)
    cached = VLMDataset(*rows)
    cached.features = filled(tmp_path / "cache", vlm, samples.image_paths())
    (pixels,), (features,) = (StepDataset(part, 0)[[list(range(8))]] for part in (samples, cached))
    assert "pixel_values" not in features and features["image_features"].shape[:2] == (7, 196)
    cpu = torch.device("cpu")
    expected, found = (model(**model_inputs(each, cpu, samples.pixels)).loss for each in (pixels, features))
    expected, found = expected.item(), found.item()
    assert found == pytest.approx(expected, abs=1e-4)


def test_pictures_are_encoded_once(tmp_path, vlm, items):
    filled(tmp_path, vlm, items[:5])
    cache = FeatureCache(tmp_path, *vlm)
    assert [path for path, _ in cache.find_missing(items).values()] == [path for path, _ in items[5:]]
    assert cache[items[0][0]].shape == (196, 64) and cache[items[0][0]].dtype == torch.float16


def test_a_pickled_cache_does_not_hold_the_features(tmp_path, vlm, items):
    cache = filled(tmp_path, vlm, items)
    expected = cache[items[0][0]]
    copy = pickle.dumps(cache)
    assert len(copy) < expected.nbytes
    assert torch.equal(pickle.loads(copy)[items[0][0]], expected)


def test_features_on_another_machine_are_missed(tmp_path, vlm, items):
    cache = FeatureCache(tmp_path, *vlm)
    encode_missing(cache, *vlm, items, rank=0, world_size=2)
    with pytest.raises(OSError, match="all ranks must share --cache_features"):
        cache.check_complete()


def test_two_ranks_share_the_work(tmp_path, vlm, items):
    for rank in (0, 1):
        cache = FeatureCache(tmp_path, *vlm)
        encode_missing(cache, *vlm, items, rank, 2)
    assert not cache.find_missing(items)
    assert len(list(cache.folder.glob("*.npy"))) == 2
    alone = filled(tmp_path / "alone", vlm, items)
    assert all(torch.equal(cache[path], alone[path]) for path, _ in items)


def test_a_changed_picture_or_encoder_is_noticed(tmp_path, vlm, items, data):
    filled(tmp_path, vlm, items)
    (data / "images/3.png").write_bytes((data / "images/4.png").read_bytes()[:-1] + b"x")
    assert len(FeatureCache(tmp_path, *vlm).find_missing(items)) == 1
    model, processor = vlm
    with torch.no_grad():
        next(model.vision_encoder.parameters()).add_(1e-3)
    assert len(FeatureCache(tmp_path, model, processor).find_missing(items)) == 8


def test_another_config_of_the_same_weights_is_another_encoder(tmp_path, items, tokenizer):
    """Also where nothing else tells, as with another activation; where it came from decides nothing."""
    model, processor = build_vlm(SIZES, str(TINY_ENCODER), tokenizer)
    filled(tmp_path, (model, processor), items)
    model.vision_encoder.config.name_or_path = "elsewhere"
    assert not FeatureCache(tmp_path, model, processor).find_missing(items)
    model.vision_encoder.config.hidden_act = "relu"
    assert len(FeatureCache(tmp_path, model, processor).find_missing(items)) == 8


def test_a_shard_whose_features_are_gone_does_not_count(tmp_path, vlm, items):
    cache = filled(tmp_path, vlm, items)
    (features,) = cache.folder.glob("*.npy")
    features.unlink()
    again = filled(tmp_path, vlm, items)
    assert torch.equal(again[items[0][0]], cache[items[0][0]])


def test_an_interrupted_shard_does_not_count(tmp_path, vlm, items):
    cache = filled(tmp_path, vlm, items)
    (listing,) = cache.folder.glob("*.json")
    listing.unlink()
    again = FeatureCache(tmp_path, *vlm)
    assert len(again.find_missing(items)) == 8
    assert torch.equal(filled(tmp_path, vlm, items)[items[2][0]], cache[items[2][0]])


def test_what_cannot_be_read_is_named(tmp_path, vlm, data):
    cache = FeatureCache(tmp_path, *vlm)
    with pytest.raises(DataError, match=r"rows.jsonl:9: cannot read image .*gone.png"):
        encode_missing(cache, *vlm, [(str(data / "images/gone.png"), "rows.jsonl:9")])
    (data / "images/0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"rows.jsonl:1: cannot read image .*0.png"):
        encode_missing(cache, *vlm, [(str(data / "images/0.png"), "rows.jsonl:1")])


def test_int8_halves_the_disk_and_stays_close(tmp_path, vlm, items):
    half, small = (filled(tmp_path, vlm, items, dtype) for dtype in ("float16", "int8"))
    assert half.folder != small.folder
    sizes = [next(cache.folder.glob("*.npy")).stat().st_size for cache in (half, small)]
    assert 0.48 < sizes[1] / sizes[0] < 0.53
    for path, _ in items:
        expected, found = half[path].float(), small[path].float()
        assert small[path].dtype == torch.float16 and found.shape == (196, 64)
        assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 0.01
        step = expected.abs().amax(-1, keepdim=True) / 127
        assert ((found - expected).abs() <= 0.51 * step + 2e-3 * expected.abs()).all()
    again = FeatureCache(tmp_path, *vlm, "int8")
    assert not again.find_missing(items) and torch.equal(again[items[0][0]], small[items[0][0]])


def test_tokens_of_zeros_and_outliers_survive_int8():
    features = torch.zeros(1, 3, 8)
    features[0, 1, 0], features[0, 2] = 1000.0, torch.linspace(-1, 1, 8)
    stored = _to_stored(features, "int8")
    found = stored["values"] * stored["scales"][..., None].astype("float32")
    assert abs(found - features.numpy()).max() < 0.5 and (found[0, 0] == 0).all()
    assert found[0, 1, 0] == pytest.approx(1000, rel=1e-3)


def test_workers_open_the_pictures(tmp_path, vlm, items):
    alone = filled(tmp_path / "alone", vlm, items)
    helped = FeatureCache(tmp_path / "helped", *vlm)
    encode_missing(helped, *vlm, items, num_workers=2)
    helped.check_complete()
    assert all(torch.equal(helped[path], alone[path]) for path, _ in items)
    Path(items[3][0]).write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"rows.jsonl:3: cannot read image \S+3.png \(not a picture"):
        encode_missing(FeatureCache(tmp_path / "other", *vlm), *vlm, items, num_workers=2)


def test_an_encoder_of_another_precision_has_features_of_its_own(tmp_path, tokenizer, items):
    folders, features = set(), []
    for encoder_dtype in ("float32", "bfloat16"):
        model, processor = build_vlm(SIZES, str(TINY_ENCODER), tokenizer)
        place(model, torch.device("cpu"), "float32", encoder_dtype)
        assert model.dtype == torch.float32 and model.vision_encoder.dtype == getattr(torch, encoder_dtype)
        cache = filled(tmp_path, (model, processor), items)
        folders.add(cache.folder)
        features.append(torch.stack([cache[path] for path, _ in items]).float())
    assert len(folders) == 2
    exact, rounded = features
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.02
