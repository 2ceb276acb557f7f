"""Every kernel compiles for every architecture without a GPU, and fits; compiled in processes of their own.

The interpreter, in which the other tests run the kernels, leaves nothing to compile.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
ARCHS = (80, 89, 90, 100, 120)


def run_compiler(*arguments):
    """Python, with Triton's compiler in place of its interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=PROJECT, timeout=400
    )


def kernels_of_the_package():
    """`op.name` of every function in the package's files that is launched: those called `_..._kernel`."""
    names = set()
    for path in (PROJECT / "kernels" / "blip3o_kernels").glob("*.py"):
        functions = (node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
        names |= {f"{path.stem}.{name.strip('_')}" for name in functions if name.endswith("_kernel")}
    return names


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_shipped_configuration_fits(arch):
    done = run_compiler("-m", "blip3o_kernels.aot", "--arch", str(arch), "--jobs", "1", "--brief")

    assert done.returncode == 0, done.stdout + done.stderr
    _, *rows, summary = done.stdout.splitlines()
    assert summary == f"{len(rows)} variants compiled, 0 spill or exceed shared memory"
    assert all(row.split()[0] == f"sm_{arch}" for row in rows)
    assert {row.split()[1] for row in rows} == kernels_of_the_package()


TOO_LARGE = """
import sys
from blip3o_kernels import aot
from blip3o_kernels.gqa_attention import AttentionConfig
from blip3o_kernels.launch import force_config

aot.SHAPES, aot.WIDE_HEADS = aot.SHAPES[:1], ()
shipped = aot.shipped_variants
aot.shipped_variants = lambda arch, **_: [
    v for v in shipped(arch, aot.SHAPES, aot.DTYPES[:1], ("gqa_attention",)) if v.kernel == "_forward_kernel"
][:1]
with force_config("gqa_attention_forward", AttentionConfig(*map(int, sys.argv[1:]))):
    sys.exit(aot.main(["--arch", "89", "--jobs", "1"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "spills"),
    [((128, 128, 4, 2), True), ((64, 64, 4, 8), False)],
    ids=["registers", "shared memory"],
)
def test_a_configuration_that_does_not_fit_fails_the_run(config, spills):
    done = run_compiler("-c", TOO_LARGE, *map(str, config))

    assert done.returncode == 1, done.stdout + done.stderr
    _, row, summary = done.stdout.splitlines()
    *_, spilled, shared, does, _, _ = row.split()
    assert does == "DOES"
    assert (int(spilled) > 0, int(shared) > 99 * 1024) == (spills, not spills)
    assert summary == "1 variants compiled, 1 spill or exceed shared memory"


TRITONS_OWN = """
import torch
from blip3o_kernels import aot
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

backend, calls = make_backend(GPUTarget("cuda", 80, 32)), []
with aot.record_launches() as recorded:
    record = JITFunction.run
    def keep(kernel, *args, grid, warmup, **kwargs):
        calls.append((kernel, args, kwargs))
        record(kernel, *args, grid=grid, warmup=warmup, **kwargs)
    JITFunction.run = keep
    for operation in aot.OPERATIONS.values():
        operation.launches(aot.SHAPES[3], torch.bfloat16)

for variant, (kernel, args, kwargs) in zip(recorded, calls, strict=True):
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, _ = bind(*args, **kwargs)
    names = kernel.arg_names
    assert dict(variant.signature) == {n: kind for n, (kind, _) in zip(names, specialization, strict=True)}, variant
    divisible = [n for n, (kind, key) in zip(names, specialization, strict=True) if kind != "constexpr" and key == "D"]
    assert list(variant.divisible) == divisible, (variant, divisible)
print(len(recorded))
"""


def test_what_is_recorded_is_what_tritons_launcher_compiles():
    done = run_compiler("-c", TRITONS_OWN)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_the_interpreter_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "blip3o_kernels.aot"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=PROJECT,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 leaves nothing to compile: unset it" in done.stderr
