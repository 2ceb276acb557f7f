"""A frozen image encoder: images in, a grid of patch embeddings out.

`EncoderSpec` holds all that is known before the weights are loaded; `PatchEncoder` adds the loaded network and checks
its output against the spec on every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from blip3o_ds.data.format.schema import TokenLayout
from blip3o_ds.errors import EncoderError


@dataclass(frozen=True)
class LoadOptions:
    """Which weights a spec's `load` reads, where to, and whether code that comes with them may run."""

    weights: str
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False


@dataclass(frozen=True)
class EncoderSpec:
    """One encoder: its sizes, the normalisation of its input, its default weights, and how they are loaded.

    `load(spec, options)` returns a module in eval mode, on the device of the options, that maps images [B, 3, H, W] to
    all of its tokens [B, N, D], CLS first if `has_cls`. `mean` and `std` are per channel, for pixels in 0..1.
    """

    name: str
    embed_dim: int
    grid_size: int
    has_cls: bool
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weights: str
    cuda_dtype: torch.dtype
    load: Callable[[EncoderSpec, LoadOptions], nn.Module]

    @property
    def num_tokens(self) -> int:
        """The tokens of the network's output, CLS included."""
        return self.grid_size**2 + int(self.has_cls)

    @property
    def input_format(self) -> tuple[object, ...]:
        """What determines the input; two encoders in which it is equal can share their inputs."""
        return (self.image_size, self.mean, self.std)

    def require_layout(self, token_layout: TokenLayout) -> None:
        """Raise EncoderError if this encoder cannot produce `token_layout`."""
        if token_layout == "cls_patch" and not self.has_cls:
            raise EncoderError(f"{self.name} has no CLS token: ask for patch_only, or choose another encoder")


@dataclass(frozen=True)
class PatchEncoder:
    """A loaded encoder; a call returns the tokens of images in a given layout."""

    spec: EncoderSpec
    _network: nn.Module
    options: LoadOptions

    def preprocess(self, image: Image.Image) -> Tensor:
        """An image as the network's input, fp32 [3, H, W]: resized, centre cropped, normalised."""
        square = resize_and_crop(image.convert("RGB"), self.spec.image_size)
        # NumPy, not torch: this runs in decoding threads, and torch would create a thread pool for each of them.
        pixels = np.asarray(square, dtype=np.float32) / 255  # [H, W, 3]
        mean, std = np.array([self.spec.mean, self.spec.std], dtype=np.float32)
        normalised = (pixels - mean) / std
        return torch.from_numpy(np.ascontiguousarray(normalised.transpose(2, 0, 1)))

    @torch.inference_mode()
    def __call__(self, images: Tensor, token_layout: TokenLayout = "patch_only") -> Tensor:
        """The tokens of `images` [B, 3, H, W], on the encoder's device and in its dtype.

        They are [B, grid², D] for `patch_only`, and [B, 1 + grid², D] with CLS first for `cls_patch`. Raises
        EncoderError if there is no CLS token, or the output has another shape than the spec says.
        """
        self.spec.require_layout(token_layout)
        tokens: Tensor = self._network(images.to(self.options.device, self.options.dtype))  # [B, N, D]
        expected = (len(images), self.spec.num_tokens, self.spec.embed_dim)
        if tuple(tokens.shape) != expected:
            raise EncoderError(
                f"{self.spec.name}: the weights {self.options.weights} give embeddings of shape {tuple(tokens.shape)}, "
                f"expected {expected}; these are the weights of another model, or images of another size"
            )
        return tokens[:, 1:] if self.spec.has_cls and token_layout == "patch_only" else tokens


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the short side to `size` (bicubic, antialiased) and crop the centre square, as CLIP does."""
    width, height = image.size
    short = min(width, height)
    if short != size:
        width, height = int(size * width / short), int(size * height / short)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
