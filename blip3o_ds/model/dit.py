"""The diffusion transformer: noisy CLIP embeddings, a timestep and EVA embeddings in, CLIP embeddings out.

The flow decides what the output means (a clean embedding or a velocity); here it is a tensor `[B, N, Dc]`.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip3o_ds.config import ModelConfig
from blip3o_ds.errors import CheckpointError
from blip3o_ds.files import atomic_write_bytes, atomic_write_json, read_json
from blip3o_ds.model import layers
from blip3o_ds.model.positions import RotaryTables

MODEL_TYPE = "blip3o_dit"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


class DiT(nn.Module):
    """Diffusion transformer over a grid of tokens, conditioned on EVA embeddings of the same grid.

    Blocks are self-attention, cross-attention and SwiGLU in sandwich norms with adaLN-zero (Lumina-Next, Zhuo et al.
    2024). EVA's tokens lie on the same grid as CLIP's, so they are also added to them at the start. At initialisation
    every gate and the output projection are zero, so the output is zero.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.norm_eps
        self.config = config
        self.activation_checkpointing = False
        self.rope = RotaryTables(
            config.grid_size, config.token_layout == "cls_patch", config.head_dim, config.rope_theta
        )
        self.timestep = layers.TimestepEmbedding(config.timestep_embed_dim, D)
        self.condition = layers.Condition(config.eva_dim, D, eps)
        self.clip_in = layers.projection(config.clip_dim, D, bias=True)
        self.first_modulation = layers.Modulation(D, 1)
        self.first_norm = layers.RMSNorm(D, eps)
        block = TokenBlock if config.attention == "none" else Block
        self.blocks = nn.ModuleList(block(config) for _ in range(config.num_layers))
        self.clip_out = layers.zero_projection(D, config.clip_dim)
        self.calibration = layers.Calibration()

    def forward(
        self,
        noisy_clip: Tensor,
        timesteps: Tensor,
        eva: Tensor,
        drop: Tensor | None = None,
        held: Tensor | None = None,
    ) -> Tensor:
        """Predict `[B, N, Dc]` for a batch; inputs are cast to the model's dtype, which the output has.

        Args:
            noisy_clip: `[B, N, Dc]`.
            timesteps: `[B]` in [0, 1], 0 is noise and 1 is data; fp32, whatever the model's dtype.
            eva: `[B, N, De]`.
            drop: `[B]` bool, True for samples that must not see their condition; None if all see it.
            held: `[B]` bool, in training: True for samples that teach the `Calibration` alone, False for those that
                teach all else; None if all teach both.

        Raises ValueError, naming the argument, if a shape does not fit the configuration.
        """
        self._check_inputs(len(noisy_clip), noisy_clip=noisy_clip, timesteps=timesteps, eva=eva, drop=drop, held=held)
        noisy_clip, eva = noisy_clip.to(self.dtype), eva.to(self.dtype)
        rope = self.rope()
        timestep = self.timestep(timesteps)  # [B, D]
        condition = self.condition(eva, drop)  # [B, N, D]

        residual = self.clip_in(noisy_clip) + condition  # [B, N, D]: both lie on the same grid
        (scale,) = self.first_modulation(timestep)
        x = self.first_norm(residual, scale)
        checkpointing = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            inputs = (residual, x, condition, timestep, rope)
            residual, x = checkpoint(block, *inputs, use_reentrant=False) if checkpointing else block(*inputs)

        return self.calibration(self.clip_out(x), noisy_clip, timesteps, held)

    @property
    def dtype(self) -> torch.dtype:
        return self.clip_in.weight.dtype

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(
        self, directory: str | Path, extra: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Write `model.safetensors` (in `dtype`) and `config.json` with the JSON `extra`, atomically, in this order."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().to("cpu", dtype).contiguous() for name, value in self.state_dict().items()}
        atomic_write_bytes(directory / WEIGHTS_NAME, save(weights, metadata={"format": "pt"}))
        content = {**(extra or {}), "model_type": MODEL_TYPE, "model": self.config.model_dump(mode="json")}
        atomic_write_json(directory / CONFIG_NAME, content)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> DiT:
        """Load what `save_pretrained` wrote, in fp32 on the CPU; a CheckpointError names the file that is wrong."""
        settings = read_pretrained_config(directory).get("model")
        try:
            model = cls(ModelConfig.model_validate(settings))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise CheckpointError(f"{Path(directory) / CONFIG_NAME}: field `model` is not valid: {problems}") from None
        model.load_weights(Path(directory) / WEIGHTS_NAME)
        return model

    def load_weights(self, path: Path, config_name: str = CONFIG_NAME) -> None:
        """Load a safetensors file that holds exactly this model's tensors; a CheckpointError says what is wrong."""
        try:
            self.load_state_dict(load_file(path))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; export the model again") from None
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged or not safetensors ({error}); export the model again") from None
        except RuntimeError as error:
            problem = textwrap.shorten(str(error), 400)
            raise CheckpointError(f"{path}: the weights of another model than {config_name} says: {problem}") from None

    def _check_inputs(self, B: int, **found: Tensor | None) -> None:
        N = self.config.num_tokens
        shapes = {"noisy_clip": (B, N, self.config.clip_dim), "timesteps": (B,), "eva": (B, N, self.config.eva_dim)}
        for name, tensor in found.items():
            shape = shapes.get(name, (B,))
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")


class Block(nn.Module):
    """Self-attention, cross-attention to EVA, SwiGLU.

    It receives the residual stream and the normalised input of its first branch, and returns both for the next block:
    each `Sandwich` ends a branch and normalises the input of the next one, which may be in the next block.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.norm_eps
        heads = (config.num_heads, config.num_kv_heads)
        self.cross_attention_rope = config.cross_attention_rope
        self.modulation = layers.Modulation(D, 6)
        self.self_attention = layers.SelfAttention(D, *heads, eps)
        self.after_self_attention = layers.Sandwich(D, eps)
        self.cross_attention = layers.CrossAttention(D, *heads, eps)
        self.after_cross_attention = layers.Sandwich(D, eps)
        self.ffn = layers.SwiGLU(D, config.ffn_dim)
        self.after_ffn = layers.Sandwich(D, eps)

    def forward(
        self, residual: Tensor, x: Tensor, condition: Tensor, timestep: Tensor, rope: layers.Rope
    ) -> tuple[Tensor, Tensor]:
        """`(residual, x)` for the next block; residual, x, condition: `[B, N, D]`, timestep: `[B, D]`."""
        gate_self, scale_cross, gate_cross, scale_ffn, gate_ffn, scale_next = self.modulation(timestep)
        cross_rope = rope if self.cross_attention_rope else None

        branch = self.self_attention(x, rope)
        residual, x = self.after_self_attention(branch, residual, gate_self, scale_cross)
        branch = self.cross_attention(x, condition, cross_rope)
        residual, x = self.after_cross_attention(branch, residual, gate_cross, scale_ffn)
        branch = self.ffn(x)
        return self.after_ffn(branch, residual, gate_ffn, scale_next)


class TokenBlock(nn.Module):
    """A block without its two attentions: what it does to a token depends on that token and its condition alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.modulation = layers.Modulation(D, 2)
        self.ffn = layers.SwiGLU(D, config.ffn_dim)
        self.after_ffn = layers.Sandwich(D, config.norm_eps)

    def forward(
        self, residual: Tensor, x: Tensor, condition: Tensor, timestep: Tensor, rope: layers.Rope
    ) -> tuple[Tensor, Tensor]:
        """As `Block.forward`; the condition is in the residual stream already."""
        gate_ffn, scale_next = self.modulation(timestep)
        return self.after_ffn(self.ffn(x), residual, gate_ffn, scale_next)


def read_pretrained_config(directory: str | Path) -> dict[str, Any]:
    """The `config.json` of an exported model: `model_type`, `model`, and `extra`; CheckpointError if it is not one."""
    path = Path(directory) / CONFIG_NAME
    content = read_json(path, CheckpointError, "give a folder that `blip3o-ds export` wrote")
    if (found := content.get("model_type")) != MODEL_TYPE:
        raise CheckpointError(f"{path}: expected model_type {MODEL_TYPE!r}, found {found!r}")
    return content
