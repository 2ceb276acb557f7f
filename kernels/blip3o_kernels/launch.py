"""How a kernel is launched: configurations, the rule that gives each one, and the table of measured ones.

A configuration comes from `tuned.json` where a search has measured this GPU, operation and class of shapes, else from
a rule below; nothing is ever searched while a model runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

TUNED_PATH = Path(__file__).with_name("tuned.json")
FP_FUSION = {"enable_fp_fusion": True}  # multiply and add as one instruction; the default changes with Triton's version
ROW_OPTIONS = {"num_stages": 1, **FP_FUSION}  # of the row kernels, whose loads feed no dot to overlap with

_assumed_arch = 80
_forced: dict[str, Any] = {}  # operation -> configuration

C = TypeVar("C")
Table = dict[str, dict[str, dict[str, dict[str, int]]]]  # GPU name -> operation -> class of shapes -> configuration


@dataclass(frozen=True)
class RowConfig:
    """A program of a row kernel takes one tile: `rows` tokens of one sample, all channels of each."""

    rows: int  # a power of two
    num_warps: int


@dataclass(frozen=True)
class SumConfig(RowConfig):
    """A program of a row kernel that also sums over tokens takes several tiles, and leaves one partial sum for all."""

    programs: int  # about how many share the tokens: enough to fill a GPU, few enough that the partial sums stay small

    def split(self, B: int, N: int) -> tuple[int, int]:
        """Programs of one sample, and tiles of one program."""
        blocks = cdiv(N, self.rows)
        tiles = max(1, B * blocks // self.programs)
        return cdiv(blocks, tiles), tiles


def row_config(N: int, D: int, elements_per_thread: int, tile: int = 4096) -> RowConfig:
    """Tiles of about `tile` elements, or one row where rows are wider.

    Args:
        elements_per_thread: of one tile: 32 are 64 bytes in flight a thread in bf16; fewer where a kernel holds more
            tiles in registers at once.
    """
    width = next_power_of_2(D)
    rows = max(1, min(tile // width, next_power_of_2(N), 64))
    warps = rows * width // (32 * elements_per_thread)
    return RowConfig(rows, min(max(warps, 1), 16))


@dataclass(frozen=True)
class RowRule:
    """How a row kernel is launched where nothing was measured, as `row_config` says, and what a search tries."""

    op: str
    elements_per_thread: int
    tile: int = 4096
    tried: tuple[int, ...] = (8, 16, 32)  # elements a thread

    def choose(self, x: Tensor, N: int, D: int) -> RowConfig:
        """The configuration for `[..., N, D]` of x's dtype on x's GPU."""
        rule = row_config(N, D, self.elements_per_thread, self.tile)
        return choose(self.op, shape_class(x.dtype, D=D), x, rule)

    def candidates(self, D: int) -> Sequence[RowConfig]:
        """Tiles of 1024 to 16384 elements, each thread with one of the shares to try."""
        sizes = [(rows, rows * next_power_of_2(D)) for rows in (1, 2, 4, 8, 16, 32, 64)]
        return [
            RowConfig(rows, elements // (32 * share))
            for rows, elements in sizes
            for share in self.tried
            if 1024 <= elements <= 16384 and 1 <= elements // (32 * share) <= 16
        ]


class SumRule(RowRule):
    """The same for a row kernel that also sums over tokens."""

    def choose(self, x: Tensor, N: int, D: int) -> SumConfig:
        """1024 programs: about two waves of four programs on each of 132 multiprocessors."""
        tile = row_config(N, D, self.elements_per_thread, self.tile)
        return choose(self.op, shape_class(x.dtype, D=D), x, SumConfig(tile.rows, tile.num_warps, 1024))

    def candidates(self, D: int) -> Sequence[SumConfig]:
        """Every tile, each for half, once, twice and four times the rule's number of programs."""
        tiles = super().candidates(D)
        return [SumConfig(tile.rows, tile.num_warps, count) for tile in tiles for count in (512, 1024, 2048, 4096)]


def candidates_of(*rules: RowRule) -> Callable[..., dict[str, Any]]:
    """An operation's `candidates`: what a search tries for each of its kernels."""
    return lambda D, *_: {rule.op: rule.candidates(D) for rule in rules}


def launch_rows(kernel: Any, programs: int, config: RowConfig, D: int, x: Tensor, *arguments: Any) -> None:
    """Launch a row kernel, whose first tensor is x and whose last parameters are D, its block and the tile's rows."""
    with torch.cuda.device_of(x):
        kernel[(programs,)](
            x, *arguments, D, next_power_of_2(D), config.rows, num_warps=config.num_warps, **ROW_OPTIONS
        )


@dataclass(frozen=True)
class TileConfig:
    """A program of an elementwise kernel takes one tile of `rows` tokens and `columns` channels, powers of two."""

    rows: int
    columns: int
    num_warps: int


def tile_config(N: int, D: int) -> TileConfig:
    """2048 elements a tile, 16 a thread; columns that divide D where they can, so that no tile is half empty."""
    columns = min(D & -D, 1024)  # the largest power of two that divides D
    if columns < 128:
        columns = min(next_power_of_2(D), 1024)
    return TileConfig(max(1, min(2048 // columns, next_power_of_2(N))), columns, 4)


def tile_candidates(D: int) -> list[TileConfig]:
    """The space a search tries: tiles of 1024 to 8192 elements, 8, 16 or 32 of them a thread."""
    return [
        TileConfig(elements // columns, columns, elements // (32 * share))
        for columns in (256, 512, 1024, 2048)
        if columns < 2 * D
        for elements in (1024, 2048, 4096, 8192)
        for share in (8, 16, 32)
        if elements >= columns and 1 <= elements // (32 * share) <= 16
    ]


def choose(op: str, shape_class: str, x: Tensor, default: C) -> C:
    """The measured configuration for x's GPU, this operation and class of shapes, or the rule's `default`.

    Raises:
        ValueError: the entry of `tuned.json` does not have the fields of `default`.
    """
    if op in _forced:
        return default if _forced[op] is None else _forced[op]
    if not x.is_cuda:
        return default
    entry = tuned_table(TUNED_PATH).get(gpu_name(x.device.index), {}).get(op, {}).get(shape_class)
    if entry is None:
        return default
    expected, found = sorted(field.name for field in fields(default)), sorted(entry)  # type: ignore[arg-type]
    if found != expected:
        raise ValueError(f"{TUNED_PATH}: {op}, {shape_class}: expected fields {expected}, found {found}; retune it")
    return type(default)(**entry)


@contextmanager
def force_config(op: str, config: Any | None) -> Iterator[None]:
    """Within this block `op` is launched with `config`, or for None as the rule says; the table is not asked."""
    _forced[op] = config
    try:
        yield
    finally:
        del _forced[op]


def arch_of(x: Tensor) -> int:
    """Compute capability of x's GPU, 90 for 9.0; for a tensor on no GPU that of `assume_arch`, else 80."""
    if not x.is_cuda:
        return _assumed_arch
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


@contextmanager
def assume_arch(arch: int) -> Iterator[None]:
    """Within this block the rules choose as for this compute capability where there is no GPU to ask."""
    global _assumed_arch
    before, _assumed_arch = _assumed_arch, arch
    try:
        yield
    finally:
        _assumed_arch = before


def shape_class(dtype: torch.dtype, **sizes: int) -> str:
    """The key of a class of shapes, `shape_class(torch.bfloat16, D=1024)` is `bfloat16 D=1024`."""
    return " ".join([str(dtype).removeprefix("torch."), *(f"{letter}={size}" for letter, size in sizes.items())])


def record(gpu: str, op: str, shape_class: str, config: Any | None, path: Path = TUNED_PATH) -> None:
    """Keep a measured configuration in the table in place of an earlier one, or none where the rule is best."""
    table = dict(tuned_table(path))
    operations = dict(table.get(gpu, {}))
    operations[op] = {key: entry for key, entry in operations.get(op, {}).items() if key != shape_class}
    if config is not None:
        operations[op][shape_class] = asdict(config)
    table[gpu] = operations
    write_atomically(path, (json.dumps(table, indent=2, sort_keys=True) + "\n").encode())
    tuned_table.cache_clear()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file under a temporary name and rename it into place: it is the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@lru_cache(maxsize=8)
def tuned_table(path: Path) -> Table:
    """The table of measured configurations.

    Raises:
        ValueError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a JSON table of launch configurations ({error}); reinstall it") from None


@lru_cache(maxsize=64)
def gpu_name(index: int) -> str:
    """The name by which the table knows a CUDA device."""
    return torch.cuda.get_device_name(index)


def as_rows(x: Tensor, per_sample: bool = True) -> Tensor:
    """`[..., D]` as `[B, N, D]` with dense channels: a view where the strides allow it, else one copy.

    Args:
        per_sample: of two dimensions, the first is B; otherwise it is N of one sample, which makes fuller tiles.
    """
    x = dense(x)
    if x.dim() == 1:
        return x[None, None]
    if x.dim() == 2:
        return x[:, None] if per_sample else x[None]
    return x.flatten(1, -2)


def dense(x: Tensor) -> Tensor:
    """x with dense channels: itself, or one copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n; 1 for n below one."""
    return 1 << max(n - 1, 0).bit_length()
