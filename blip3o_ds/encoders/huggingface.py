"""EVA-CLIP-8B and CLIP ViT-L/14 through `transformers`, from a hub name or a folder.

Both give the last hidden state of the vision tower, before any final norm or projection: 257 tokens, CLS first, then
16x16 patches row by row. The network of EVA-CLIP is code beside its weights, and runs only with explicit consent.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from blip3o_ds.encoders.encoder import EncoderSpec, LoadOptions
from blip3o_ds.errors import EncoderError


def load_clip(spec: EncoderSpec, options: LoadOptions) -> nn.Module:
    """The vision tower of CLIP ViT-L/14 (Radford et al. 2021): [B, 3, 224, 224] -> [B, 257, 1024]."""
    model, missing = _from_pretrained("CLIPVisionModel", spec, replace(options, trust_remote_code=False))
    _require_weights(spec, options, missing)
    return _LastHiddenState(model).to(options.device)


def load_eva_clip(spec: EncoderSpec, options: LoadOptions) -> nn.Module:
    """The vision tower of EVA-CLIP-8B (Sun et al. 2024): [B, 3, 224, 224] -> [B, 257, 4096]."""
    if not options.trust_remote_code:
        raise EncoderError(
            f"{spec.name}: {options.weights} brings its own Python code, which would run here; read that code, then "
            "allow it with trust_remote_code (--trust_remote_code on the command line)"
        )
    model, missing = _from_pretrained("AutoModel", spec, options)
    tower = getattr(model, "vision_model", None)
    if not isinstance(tower, nn.Module) or not hasattr(tower, "config"):
        raise EncoderError(
            f"{spec.name}: the model in {options.weights}, a {type(model).__name__}, has no `vision_model` with a "
            "configuration; expected the layout of BAAI/EVA-CLIP-8B"
        )
    missing = {name.removeprefix("vision_model.") for name in missing if name.startswith("vision_model.")}
    buffers = {name for name, _ in tower.named_buffers()}
    _require_weights(spec, options, missing - buffers)
    _restore_buffers(tower, missing & buffers)
    return _LastHiddenState(tower).to(options.device)


CLIP_VIT_L14 = EncoderSpec(
    name="clip-vit-l14",
    embed_dim=1024,
    grid_size=16,
    has_cls=True,
    image_size=224,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    weights="openai/clip-vit-large-patch14",
    cuda_dtype=torch.bfloat16,  # as fast as fp16, and the activations of a deep tower do not overflow
    load=load_clip,
)
EVA_CLIP_8B = replace(CLIP_VIT_L14, name="eva-clip-8b", embed_dim=4096, weights="BAAI/EVA-CLIP-8B", load=load_eva_clip)
ENCODERS = (EVA_CLIP_8B, CLIP_VIT_L14)


class _LastHiddenState(nn.Module):
    """A vision tower with only its last hidden state as output."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        # All three are passed, since older model code reads missing ones from fields that its configuration may lack.
        output = self.tower(images, output_attentions=False, output_hidden_states=False, return_dict=True)
        return cast(Tensor, output.last_hidden_state)  # [B, N, D]


def _from_pretrained(class_name: str, spec: EncoderSpec, options: LoadOptions) -> tuple[nn.Module, set[str]]:
    """The model, and the names of the parameters and saved buffers that are not in its weights file."""
    try:
        import transformers
    except ImportError as error:
        raise EncoderError(f"{spec.name} needs the package transformers: pip install 'blip3o-ds[extract]'") from error
    arguments = {"dtype": options.dtype, "trust_remote_code": options.trust_remote_code, "output_loading_info": True}
    try:
        model, loading = getattr(transformers, class_name).from_pretrained(options.weights, **arguments)
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        raise EncoderError(
            f"{spec.name}: cannot load {options.weights}: {error}. Name a folder that holds the model (config.json and "
            "its weights), or a hub repository that this machine can reach"
        ) from error
    return model, set(loading["missing_keys"])


def _require_weights(spec: EncoderSpec, options: LoadOptions, missing: set[str]) -> None:
    """Refuse weights that are incomplete: transformers initialises the rest at random, and only warns."""
    if missing:
        raise EncoderError(
            f"{spec.name}: {options.weights} lacks {len(missing)} of the vision tower's weights, among them "
            f"{min(missing)}; name the weights of a complete model"
        )


def _restore_buffers(tower: nn.Module, missing: set[str]) -> None:
    """Compute the buffers of `tower` that no weights file holds: position numbers, rotary tables.

    transformers 5 builds a model on the meta device and fills in the saved tensors; what older model code computed in
    its constructor and did not save stays uninitialised (huggingface/transformers issue 48892).
    """
    lost = {name for name, _ in tower.named_buffers()} - set(tower.state_dict()) | missing
    if not lost:
        return

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    # The stubs know no hook that returns the parameter to register.
    on_meta = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        fresh = type(tower)(tower.config)
    finally:
        on_meta.remove()
    for name in lost:
        tower.get_buffer(name).copy_(fresh.get_buffer(name))
