"""Block sizes of the attention kernels: the rule that gives them, and the space that a search may try.

A block holds its scores and accumulators in registers, 255 a thread, so that head_dim and precision decide: the rule's
sizes compile for every architecture without a spill (`python -m blip3o_kernels.aot`), and none has been timed yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

KERNELS = ("forward", "dq", "dkdv")


@dataclass(frozen=True)
class AttentionConfig:
    """A block is `rows` queries (of all heads of a group) by `keys` keys."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def attention_config(kernel: str, D: int, dtype: torch.dtype, arch: int) -> AttentionConfig:
    """The rule.

    Hopper and Blackwell's data centre parts multiply in warpgroups of 64 rows and like two blocks of 8 warps on a
    multiprocessor; the others keep operands in registers and get smaller blocks. fp32 is three tf32 products, whose
    split operands fill the registers of even small blocks.

    Args:
        kernel: `forward`, `dq` or `dkdv`.
        D: head_dim, up to 128.
        arch: compute capability, 90 for 9.0.
    """
    wide = D > 64
    warpgroups = arch // 10 in (9, 10)
    if dtype == torch.float32:
        return _fp32_config(kernel, wide)
    if kernel == "dq":
        return AttentionConfig(64, 32, 4, 2) if wide else AttentionConfig(64, 64, 4, 3)
    if kernel == "dkdv":
        if wide:
            return AttentionConfig(32, 64, 8, 2)
        return AttentionConfig(32, 128, 8, 3) if warpgroups else AttentionConfig(64, 64, 4, 2)
    if warpgroups:
        return AttentionConfig(128, 64, 8, 2 if wide else 3)
    return AttentionConfig(64, 32, 4, 2) if wide else AttentionConfig(64, 64, 4, 3)


def _fp32_config(kernel: str, wide: bool) -> AttentionConfig:
    if wide:
        return AttentionConfig(16, 32, 4, 2) if kernel == "forward" else AttentionConfig(16, 16, 8, 1)
    return {
        "forward": AttentionConfig(32, 32, 4, 2),
        "dq": AttentionConfig(32, 32, 8, 1),
        "dkdv": AttentionConfig(32, 32, 8, 2),
    }[kernel]


def candidates(D: int, dtype: torch.dtype, arch: int) -> dict[str, list[AttentionConfig]]:
    """What a search tries for each kernel: the rule's, and what is likely to fit registers; in fp32 only the rule's."""
    space = [AttentionConfig(*sizes) for sizes in product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3))]
    found = {}
    for kernel in KERNELS:
        limit = 0 if dtype == torch.float32 else 160 if kernel == "dkdv" else 128
        fitting = [config for config in space if 48 <= _registers(kernel, config, D) <= limit]
        found[kernel] = list(dict.fromkeys([attention_config(kernel, D, dtype, arch), *fitting]))
    return found


def _registers(kernel: str, config: AttentionConfig, D: int) -> float:
    """Registers of a thread for scores, their 16-bit copies and accumulators; addresses and operands need more."""
    scores = config.rows * config.keys
    elements = {
        "forward": 1.5 * scores + config.rows * D,
        "dq": 2.5 * scores + config.rows * D,
        "dkdv": 3 * scores + 2 * config.keys * D,
    }[kernel]
    return elements / (32 * config.num_warps)
