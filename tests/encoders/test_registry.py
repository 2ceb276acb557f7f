"""The registry and what every encoder has in common: layouts, shape check, input preparation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_ds.encoders.encoder import EncoderSpec, LoadOptions, PatchEncoder
from blip3o_ds.encoders.registry import ENCODERS, load_encoder
from blip3o_ds.errors import EncoderError


def test_unknown_name_gets_the_nearest_and_the_list():
    with pytest.raises(EncoderError, match=r"did you mean 'clip-vit-l14'\?.*eva-clip-8b.*efficientnet-lite2-head"):
        load_encoder("clip_vit_l_14")


def test_published_pair_has_the_sizes_of_the_design():
    eva, clip = ENCODERS["eva-clip-8b"], ENCODERS["clip-vit-l14"]

    assert (eva.embed_dim, eva.num_tokens, clip.embed_dim, clip.num_tokens) == (4096, 257, 1024, 257)
    assert eva.input_format == clip.input_format


def test_patch_only_is_cls_patch_without_its_first_token(condition):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    with_cls, patches = condition(images, "cls_patch"), condition(images, "patch_only")

    assert with_cls.shape == (2, 17, 10)
    assert torch.equal(with_cls[:, 1:], patches)
    # This encoder's CLS is the mean token, which tells it from any patch.
    assert torch.allclose(with_cls[:, 0], patches.mean(1), atol=1e-5)


def test_weights_of_another_width_are_an_error(condition):
    options = LoadOptions("some/weights", torch.device("cpu"), torch.float32)
    wider = PatchEncoder(_with_width(condition.spec, 12), condition._network, options)

    with pytest.raises(
        EncoderError, match=r"some/weights give embeddings of shape \(1, 17, 10\), expected \(1, 17, 12\)"
    ):
        wider(torch.zeros(1, 3, 32, 32))


def _with_width(spec: EncoderSpec, embed_dim: int) -> EncoderSpec:
    return EncoderSpec(**(vars(spec) | {"embed_dim": embed_dim}))


def test_preprocess_keeps_the_centre_of_the_long_side(condition):
    image = np.zeros((32, 96, 3), dtype=np.uint8)
    image[:, 32:64] = np.random.default_rng(0).integers(0, 256, (32, 32, 3))

    pixels = condition.preprocess(Image.fromarray(image))

    expected = (image[:, 32:64].transpose(2, 0, 1) / 255 - 0.5) / 0.25
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-6)


def test_preprocess_resizes_the_short_side(condition):
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], (64, 128, 3))

    pixels = condition.preprocess(Image.fromarray(np.ascontiguousarray(ramp)))

    # Halving a linear ramp gives the mean of neighbouring rows, whatever the antialiasing kernel.
    rows = ((pixels.numpy() * 0.25 + 0.5) * 255).mean(axis=(0, 2))  # [32]
    expected = ramp[:, 0, 0].reshape(32, 2).mean(axis=1)
    assert pixels.shape == (3, 32, 32)
    np.testing.assert_allclose(rows[2:-2], expected[2:-2], atol=1.0)
