"""A frozen image encoder as the rest of the project sees it: pictures in, a grid of patch embeddings out.

Everything that is known of an encoder before its weights are loaded stands in its `EncoderSpec`;
`PatchEncoder` adds the loaded network and holds it to the spec on every call.
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
    """What a spec's `load` is told: where the weights are, where they go, and whether their code may run."""

    weights: str
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False


@dataclass(frozen=True)
class EncoderSpec:
    """One encoder: its sizes, the normalisation of its input, its usual weights, and how they are loaded.

    `load(spec, options)` returns a module in eval mode on the options' device that maps images [B, 3, H, W]
    to all of its tokens [B, N, D], CLS first where `has_cls`. `mean` and `std` are per channel for pixels in
    0..1.
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
        """Tokens that the network gives, CLS included."""
        return self.grid_size**2 + int(self.has_cls)

    @property
    def input_format(self) -> tuple[object, ...]:
        """What decides an input's values; two encoders that agree in it can share their inputs."""
        return (self.image_size, self.mean, self.std)

    def require_layout(self, token_layout: TokenLayout) -> None:
        """Raise EncoderError when this encoder cannot give `token_layout`."""
        if token_layout == "cls_patch" and not self.has_cls:
            raise EncoderError(f"{self.name} has no CLS token: ask for patch_only, or choose another encoder")


class PatchEncoder:
    """A loaded encoder; calling it with images gives their tokens in the layout asked for."""

    def __init__(self, spec: EncoderSpec, network: nn.Module, options: LoadOptions) -> None:
        self.spec = spec
        self.weights = options.weights
        self.device = options.device
        self.dtype = options.dtype
        self._network = network

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def embed_dim(self) -> int:
        return self.spec.embed_dim

    @property
    def grid_size(self) -> int:
        return self.spec.grid_size

    @property
    def has_cls(self) -> bool:
        return self.spec.has_cls

    @property
    def image_size(self) -> int:
        return self.spec.image_size

    def preprocess(self, image: Image.Image) -> Tensor:
        """One picture as the network's input, fp32 [3, H, W]: resized, centre cropped, normalised."""
        square = resize_and_crop(image.convert("RGB"), self.image_size)
        # NumPy, not torch: this runs in decoding threads, each of which would get a thread pool of torch's.
        pixels = np.asarray(square, dtype=np.float32) / 255  # [H, W, 3]
        normalised = (pixels - np.float32(self.spec.mean)) / np.float32(self.spec.std)
        return torch.from_numpy(np.ascontiguousarray(normalised.transpose(2, 0, 1)))

    @torch.inference_mode()
    def __call__(self, images: Tensor, token_layout: TokenLayout = "patch_only") -> Tensor:
        """Tokens of `images` [B, 3, H, W] on the encoder's device and in its dtype.

        Returns [B, grid², D] for `patch_only` and [B, 1 + grid², D] with CLS first for `cls_patch`. Raises
        EncoderError where the encoder has no CLS token, or its weights give another shape than its spec says.
        """
        self.spec.require_layout(token_layout)
        tokens = self._network(images.to(self.device, self.dtype))  # [B, N, D]
        expected = (len(images), self.spec.num_tokens, self.embed_dim)
        if tuple(tokens.shape) != expected:
            raise EncoderError(
                f"{self.name}: the weights {self.weights} give embeddings of shape {tuple(tokens.shape)}, "
                f"expected {expected}; these are the weights of another model, or images of another size"
            )
        if self.has_cls and token_layout == "patch_only":
            return tokens[:, 1:]
        return tokens


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the short side to `size` (bicubic, antialiased) and cut out the centre square, as CLIP does."""
    width, height = image.size
    short = min(width, height)
    if short != size:
        width, height = int(size * width / short), int(size * height / short)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
