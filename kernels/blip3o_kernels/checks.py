"""What the operations check of an argument, whichever path they take.

Each raises ValueError that begins with the argument's name and says what was expected and what was found.
"""

from __future__ import annotations

from torch import Tensor

MAX_CHANNELS = 8192  # a row kernel holds a whole row in registers


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """The shape is exactly `expected`."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)}, found {list(tensor.shape)}")


def check_floating(name: str, tensor: Tensor, dims: int | None = None) -> None:
    """The dtype is floating, and there are `dims` dimensions (at least one, where not given)."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, found {tensor.dtype}")
    if dims is not None and tensor.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, found shape {list(tensor.shape)}")
    if tensor.dim() == 0:
        raise ValueError(f"{name}: expected channels as the last dimension, found a scalar")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """The device is that of another argument."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name} has, found {tensor.device}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """The dtype and the device are those of another argument."""
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name}: expected {other.dtype} as {other_name} has, found {tensor.dtype}")
    check_device(name, tensor, other_name, other)


def check_parameter(name: str, tensor: Tensor, expected: tuple[int, ...], other_name: str, other: Tensor) -> None:
    """A floating tensor of this shape on the device of another argument; its dtype is its own."""
    check_shape(name, tensor, expected)
    check_floating(name, tensor)
    check_device(name, tensor, other_name, other)


def too_wide(name: str, x: Tensor) -> str | None:
    """Why a row kernel cannot take x, or None: a row must fit in the registers of one program."""
    D = x.shape[-1]
    return f"{name}: expected 1 to {MAX_CHANNELS} channels, found {D}" if not 1 <= D <= MAX_CHANNELS else None
