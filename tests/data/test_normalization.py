"""The normaliser against NumPy, there and back."""

import numpy as np
import pytest
import torch

from blip3o_ds.data.format.manifest import ChannelStats
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.errors import CheckpointError, ConfigError, DataError

RNG = np.random.default_rng(0)
EVA, CLIP = RNG.normal(2, 5, (40, 7, 6)), RNG.normal(-1, 0.2, (40, 7, 4))


def stats(x: np.ndarray) -> ChannelStats:
    return ChannelStats(mean=x.mean((0, 1)), var=x.var((0, 1)), count=x.shape[0] * x.shape[1])


def build(mode: str) -> Normalizer:
    return Normalizer.from_stats(mode, {"eva": stats(EVA), "clip": stats(CLIP)})


def of(normalizer: Normalizer, name: str, x: torch.Tensor) -> torch.Tensor:
    return normalizer({name: x})[name]


def test_minimal_changes_nothing():
    x = torch.from_numpy(CLIP)
    normalizer = build("minimal")
    assert torch.equal(of(normalizer, "clip", x), x)
    assert torch.equal(normalizer.inverse("clip", x), x)


def test_full_gives_every_token_unit_length_and_no_way_back():
    normalizer = build("full")
    for found, raw in (
        (of(normalizer, "eva", torch.from_numpy(EVA)), EVA),
        (of(normalizer, "clip", torch.from_numpy(CLIP)), CLIP),
    ):
        np.testing.assert_allclose(found, raw / np.linalg.norm(raw, axis=-1, keepdims=True), rtol=1e-5)
    y = of(normalizer, "clip", torch.from_numpy(CLIP))
    assert torch.equal(normalizer.inverse("clip", y), y)
    assert of(normalizer, "clip", torch.zeros(2, 4)).isfinite().all()


def test_standardize_centres_and_scales_every_channel_and_comes_back():
    normalizer = build("standardize")
    for found, raw in (
        (of(normalizer, "eva", torch.from_numpy(EVA)), EVA),
        (of(normalizer, "clip", torch.from_numpy(CLIP)), CLIP),
    ):
        np.testing.assert_allclose(found.mean((0, 1)), np.zeros(raw.shape[-1]), atol=1e-5)
        np.testing.assert_allclose(found.numpy().std((0, 1)), np.ones(raw.shape[-1]), rtol=1e-5)
    clip = torch.from_numpy(CLIP)
    torch.testing.assert_close(normalizer.inverse("clip", of(normalizer, "clip", clip)), clip, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["minimal", "full", "standardize"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_kept_and_the_arithmetic_is_fp32(mode, dtype):
    x = torch.from_numpy(CLIP).to(dtype)
    normalizer = build(mode)
    assert of(normalizer, "clip", x).dtype == normalizer.inverse("clip", x).dtype == dtype
    assert torch.equal(of(normalizer, "clip", x), of(normalizer, "clip", x.float()).to(dtype))


def test_a_constant_channel_is_centred_and_stays_finite():
    mean, std = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0])
    normalizer = Normalizer("standardize", {"clip": (mean, std)})
    assert of(normalizer, "clip", torch.tensor([[3.0, 5.0], [3.5, 1.0]])).tolist() == [[0.0, 2.0], [0.5, 0.0]]


@pytest.mark.parametrize("mode", ["minimal", "full", "standardize"])
def test_the_scale_is_how_far_the_inverse_moves_apart(mode):
    normalizer, y = build(mode), torch.from_numpy(CLIP)
    moved = normalizer.inverse("clip", y + 1) - normalizer.inverse("clip", y)
    torch.testing.assert_close(normalizer.scale("clip", y).double().expand_as(y), moved, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["minimal", "full", "standardize"])
def test_a_saved_normaliser_comes_back_the_same(mode, tmp_path):
    normalizer, x = build(mode), torch.from_numpy(EVA)
    normalizer.save(tmp_path / "normalizer.json")
    loaded = Normalizer.load(tmp_path / "normalizer.json")
    assert loaded.state_dict() == normalizer.state_dict() == Normalizer.from_state(normalizer.state_dict()).state_dict()
    assert torch.equal(of(loaded, "eva", x), of(normalizer, "eva", x))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"mode": "odd"}', '{"mode": "standardize"}', "{}"])
def test_a_file_that_is_no_normaliser_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "normalizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"normalizer\.json"):
        Normalizer.load(tmp_path / "normalizer.json")


def test_wrong_use_is_refused():
    with pytest.raises(ConfigError, match="'unit': expected one of minimal, full, standardize"):
        Normalizer("unit")
    with pytest.raises(ConfigError, match="standardize: no mean and std; read them from the manifest"):
        Normalizer("standardize")
    with pytest.raises(DataError, match="clip: 5 channels, but the normalisation statistics have 4"):
        of(build("standardize"), "clip", torch.ones(2, 5))
