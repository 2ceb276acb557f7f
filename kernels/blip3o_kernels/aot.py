"""Compile every kernel as training launches it, for GPUs that need not be here: `python -m blip3o_kernels.aot`.

Prints registers, spills and shared memory of each, and exits 1 on a spill or on more shared memory than a block of the
GPU may have. What is launched is recorded, not listed: an operation's `launches(shape, dtype)` calls its launchers on
`meta` tensors, and each `kernel[grid](...)` inside becomes a `Variant` in place of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from blip3o_kernels.launch import assume_arch
from blip3o_kernels.registry import OPERATIONS
from blip3o_kernels.workload import SHAPES, ModelShape

SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of one block, by architecture
EXTENTS = {"H", "HKV", "G", "D"}  # constants that only count or stride; blocks and widths are chosen from them
BACKEND = make_backend(GPUTarget("cuda", 80, 32))  # a launch specialises alike on every architecture
WIDE_HEADS = (  # no preset has them, but the attention kernels take them, with other configurations
    ModelShape("heads-of-96", 768, 8, 4, 3072, 257),
    ModelShape("heads-of-128", 1024, 8, 4, 4096, 257),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Variant:
    """One specialisation of one kernel: what Triton's launcher would compile for a call."""

    module: str  # of the kernel, in this package
    kernel: str
    signature: tuple[tuple[str, str], ...]  # argument -> Triton type, "constexpr" among them
    constexprs: tuple[tuple[str, object], ...]
    divisible: tuple[str, ...]  # arguments known to be multiples of 16
    options: tuple[tuple[str, object], ...]  # num_warps, num_stages and what else the launch set

    @property
    def pointers(self) -> list[str]:
        """The types of what its tensors hold, as `bf16`."""
        return [kind[1:] for _, kind in self.signature if kind.startswith("*")]

    @property
    def configuration(self) -> tuple[object, ...]:
        """The kernel, the dtype it works on, and all that a rule has chosen for it."""
        chosen = tuple((name, value) for name, value in self.constexprs if name.isupper() and name not in EXTENTS)
        return self.module, self.kernel, self.pointers[0], self.options, chosen

    @property
    def label(self) -> str:
        """Its dtypes, and its constants that are not strides, as `bf16 BLOCK=64`."""
        constants = (f"{name}={value}" for name, value in self.constexprs if name.isupper())
        return " ".join(["/".join(dict.fromkeys(self.pointers)), *constants])


@dataclass(frozen=True)
class Usage:
    """What one compiled variant takes of a multiprocessor."""

    arch: int
    variant: Variant
    registers: int  # of a thread
    spilled: int  # bytes of stack, of a thread
    shared: int  # bytes, of a block

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED_LIMIT[self.arch] * 1024


def shipped_variants(
    arch: int,
    shapes: tuple[ModelShape, ...] = SHAPES + WIDE_HEADS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    operations: tuple[str, ...] = tuple(OPERATIONS),
) -> list[Variant]:
    """The distinct variants of these operations, in the order of their first launch."""
    with assume_arch(arch), record_launches() as recorded:
        for name in operations:
            for shape in shapes:
                for dtype in dtypes:
                    OPERATIONS[name].launches(shape, dtype)
    return list(dict.fromkeys(recorded))


def one_of_each_configuration(variants: list[Variant]) -> list[Variant]:
    """From variants that differ only in sizes and in which tensors are there, the one that has the most tensors."""
    chosen: dict[tuple[object, ...], Variant] = {}
    for variant in variants:
        other = chosen.setdefault(variant.configuration, variant)
        if len(variant.pointers) > len(other.pointers):
            chosen[variant.configuration] = variant
    return list(chosen.values())


@contextlib.contextmanager
def record_launches() -> Iterator[list[Variant]]:
    """Within this context `kernel[grid](...)` appends to the list that it yields, and launches nothing."""
    recorded: list[Variant] = []

    def record(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        recorded.append(_variant(kernel, args, kwargs))

    launch, JITFunction.run = JITFunction.run, record
    try:
        yield recorded
    finally:
        JITFunction.run = launch


def compile_variant(arch: int, variant: Variant) -> Usage:
    """Compile for `arch`, with no GPU, and read the code object's resources."""
    kernel = getattr(importlib.import_module(f"blip3o_kernels.{variant.module}"), variant.kernel)
    names = kernel.arg_names
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible}
    source = ASTSource(kernel, dict(variant.signature), dict(variant.constexprs), attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(variant.options))
    registers, stack = _resources(compiled.asm["cubin"])
    return Usage(arch, variant, registers, stack, compiled.metadata.shared)


def _variant(kernel: JITFunction, args: tuple[object, ...], kwargs: dict[str, object]) -> Variant:
    """The specialisation that Triton's launcher chooses for these arguments."""
    bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    bound, specialization, options = bind(*args, **kwargs)
    kinds = {name: kind for name, (kind, _) in zip(bound, specialization, strict=True)}
    constexprs = [(name, bound[name]) for name, kind in kinds.items() if kind == "constexpr"]
    keys = zip(kinds.items(), specialization, strict=True)
    divisible = [name for (name, kind), (_, key) in keys if kind != "constexpr" and key == "D"]
    module = kernel.fn.__module__.rpartition(".")[2]
    return Variant(
        module, kernel.fn.__name__, tuple(kinds.items()), tuple(constexprs), tuple(divisible), tuple(options.items())
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, by `cuobjdump --dump-resource-usage`."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if not found:
        raise RuntimeError(f"{tool}: expected a line with REG and STACK, found:\n{report}")
    return int(found[1]), int(found[2])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m blip3o_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--brief", action="store_true", help="one variant of each configuration, and no fp16")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")

    # fp16 has bf16's sizes, rules and instructions
    dtypes = (torch.bfloat16, torch.float32) if options.brief else DTYPES
    chosen = one_of_each_configuration if options.brief else list
    work = [(arch, variant) for arch in options.arch for variant in chosen(shipped_variants(arch, dtypes=dtypes))]
    with ProcessPoolExecutor(options.jobs) as pool:
        usages = list(pool.map(compile_variant, *zip(*work, strict=True)))
    print_table(usages)
    return 0 if all(usage.fits for usage in usages) else 1


def print_table(usages: list[Usage]) -> None:
    row = "{:>6} {:<24} {:<72} {:>5} {:>6} {:>9} {:>7} {:>10}  {}"
    write = sys.stdout.write
    write(row.format("arch", "kernel", "variant", "warps", "stages", "registers", "spilled", "shared", "") + "\n")
    for u in usages:
        options, verdict = dict(u.variant.options), "" if u.fits else "DOES NOT FIT"
        name = f"{u.variant.module}.{u.variant.kernel.strip('_')}"
        launch = options.get("num_warps", "-"), options.get("num_stages", "-")
        columns = (f"sm_{u.arch}", name, u.variant.label, *launch, u.registers, u.spilled, u.shared)
        write(row.format(*columns, verdict).rstrip() + "\n")
    misfits = sum(not u.fits for u in usages)
    write(f"{len(usages)} variants compiled, {misfits} spill or exceed shared memory\n")


if __name__ == "__main__":
    sys.exit(main())
