"""The demo pair: two small ImageNet networks whose weights come as Python packages, so no download is needed.

EfficientNet-Lite2 with its head (1280 wide, rectified, sparse) plays the condition, the last block of
EfficientNet-Lite0 before the head (320 wide, linear) the target; at 512 pixels both give a 16x16 grid, as the
CLIP pair does at 224.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from blip3o_ds.encoders.encoder import EncoderSpec, LoadOptions
from blip3o_ds.errors import EncoderError

PACKAGE = "package:"
IMAGE_SIZE = 512


def load_lite2_head(spec: EncoderSpec, options: LoadOptions) -> nn.Module:
    """EfficientNet-Lite2 (Tan & Le 2019) with its 1x1 head: [B, 3, 512, 512] -> [B, 256, 1280]."""
    return _PatchGrid(_load_network("efficientnet-lite2", options), with_head=True).to(options.device, options.dtype)


def load_lite0_last_block(spec: EncoderSpec, options: LoadOptions) -> nn.Module:
    """EfficientNet-Lite0 up to its last block, a linear output: [B, 3, 512, 512] -> [B, 256, 320]."""
    return _PatchGrid(_load_network("efficientnet-lite0", options), with_head=False).to(options.device, options.dtype)


class _PatchGrid(nn.Module):
    """The convolutions of an EfficientNet with their feature map read as tokens, row by row."""

    def __init__(self, network: nn.Module, *, with_head: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = nn.Sequential(*network._blocks)
        head = (network._conv_head, network._bn1, network._swish) if with_head else ()
        self.head = nn.Sequential(*head)
        self.eval().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)  # [B, 3, H, W]
        if images.device.type == "cpu":
            # One image's activations stay in the cache, a batch's do not: twice as fast, and the result
            # does not depend on who else is in the batch.
            return torch.cat([self._tokens(image) for image in images.split(1)])
        return self._tokens(images)

    def _tokens(self, images: Tensor) -> Tensor:
        features = self.head(self.blocks(self.stem(images)))  # [B, D, 16, 16]
        return features.flatten(2).transpose(1, 2)


def _load_network(architecture: str, options: LoadOptions) -> nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise _missing_package("efficientnet-lite-pytorch") from error
    # The padding of every strided convolution is fixed at construction from the image size.
    network = EfficientNet.from_name(architecture, image_size=IMAGE_SIZE)
    path = _weights_path(options.weights)
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    except (OSError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        raise EncoderError(
            f"{path}: not the weights of {architecture}; expected a state dict that fits strictly ({error})"
        ) from error
    return network


def _weights_path(weights: str) -> Path:
    """A file named as such, or the one inside a package named `package:module:Class`."""
    if not weights.startswith(PACKAGE):
        return Path(weights)
    module_name, class_name = weights.removeprefix(PACKAGE).split(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise _missing_package(module_name.replace("_", "-")) from error
    return Path(getattr(module, class_name).get_model_file_path())


def _missing_package(name: str) -> EncoderError:
    return EncoderError(f"the demo encoders need the package {name}: pip install 'blip3o-ds[demo]'")
