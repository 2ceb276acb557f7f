"""The encoders by name: `load_encoder("clip-vit-l14")`.

An encoder pair is a file with a tuple of specs, which is added to `ENCODERS` here.
"""

from __future__ import annotations

import difflib

import torch

from blip3o_ds.encoders import efficientnet, huggingface
from blip3o_ds.encoders.encoder import EncoderSpec, LoadOptions, PatchEncoder
from blip3o_ds.errors import EncoderError

ENCODERS: dict[str, EncoderSpec] = {spec.name: spec for spec in huggingface.ENCODERS + efficientnet.ENCODERS}


def load_encoder(
    name: str,
    weights: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PatchEncoder:
    """Load an encoder by its name in `ENCODERS`; an EncoderError says why that is not possible.

    By default the weights are the spec's, the device is CUDA if available, and the dtype is fp32 on a CPU and the
    spec's `cuda_dtype` on CUDA. `trust_remote_code` allows code that comes with the weights to run.
    """
    spec = find_spec(name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (spec.cuda_dtype if device.type == "cuda" else torch.float32)
    options = LoadOptions(weights or spec.weights, device, dtype, trust_remote_code)
    return PatchEncoder(spec, spec.load(spec, options), options)


def find_spec(name: str) -> EncoderSpec:
    """The spec of an encoder, or an EncoderError with the nearest name and all names."""
    if name in ENCODERS:
        return ENCODERS[name]
    near = difflib.get_close_matches(name, ENCODERS, n=1, cutoff=0.0)
    raise EncoderError(f"unknown encoder {name!r}: did you mean {near[0]!r}? There are {', '.join(ENCODERS)}")
