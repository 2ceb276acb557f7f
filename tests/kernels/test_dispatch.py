"""Which path an operation takes, under torch.compile, checkpointing, autocast and torch.func too."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import blip3o_kernels
from blip3o_kernels import rms_norm, use_kernels
from blip3o_kernels.dispatch import triton_chosen
from blip3o_kernels.registry import OPERATIONS
from tests.kernels.accuracy import DEVICE, random


def run_python(code, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "BLIP3O_KERNELS")}
    return subprocess.run([sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True)


def used_kernel(x):
    """Whether the output's gradient is the kernel's."""
    return "blip3o" in rms_norm(x.requires_grad_(), torch.ones(x.shape[-1], device=x.device)).grad_fn.name()


def test_auto_takes_the_kernel_on_cuda_only():
    with use_kernels("auto"):
        assert used_kernel(random(2, 4)) == (DEVICE == "cuda")
        assert not used_kernel(torch.ones(2, 4))
        assert not triton_chosen(torch.ones(2, dtype=torch.float64, device=DEVICE))


def test_the_mode_is_restored_also_after_an_error():
    def fail():
        with use_kernels("triton"):
            assert used_kernel(random(2, 4))
            raise KeyError

    with use_kernels("torch"):
        with pytest.raises(KeyError):
            fail()
        assert not used_kernel(random(2, 4))


def test_an_unknown_mode_is_refused():
    with (
        pytest.raises(ValueError, match=r"^use_kernels: expected one of auto, triton, torch, found 'cuda'"),
        use_kernels("cuda"),
    ):
        pass
    done = run_python("import blip3o_kernels", BLIP3O_KERNELS="fast")
    assert done.returncode != 0
    assert "BLIP3O_KERNELS: expected one of auto, triton, torch, found 'fast'" in done.stderr


def test_the_environment_variable_chooses():
    code = (
        "import torch, blip3o_kernels as k; "
        "print(k.rms_norm(torch.ones(2, 4, requires_grad=True), torch.ones(4)).grad_fn.name())"
    )
    chosen = run_python(code, BLIP3O_KERNELS="triton", TRITON_INTERPRET="1")
    assert "blip3o" in chosen.stdout, chosen.stderr


def test_a_cpu_tensor_without_the_interpreter_is_refused():
    code = "import torch, blip3o_kernels as k; k.rms_norm(torch.ones(2, 4), torch.ones(4))"
    done = run_python(code, BLIP3O_KERNELS="triton")
    assert "a tensor is on cpu" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


def test_without_triton_everything_runs_in_pytorch():
    code = """
import importlib.util, torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import blip3o_kernels as k
assert torch.equal(k.rms_norm(2 * torch.ones(1, 4), torch.ones(4), 0.0), torch.ones(1, 4))
from blip3o_kernels.registry import OPERATIONS
assert all(callable(getattr(k, name)) for name in OPERATIONS)
with k.use_kernels("triton"):
    k.dispatch.triton_chosen(torch.ones(1))
"""
    done = run_python(code)
    assert "Triton is not installed" in done.stderr


def test_arguments_may_be_given_by_name_and_a_wrong_call_is_a_type_error():
    x, weight, scale = random(2, 3, 4), random(4, seed=1), random(2, 4, seed=2)
    assert torch.equal(rms_norm(weight=weight, x=x, scale=scale), rms_norm(x, weight, 1e-6, scale))
    for args, kwargs, message in (
        ((x,), {}, "missing a required argument: 'weight'"),
        ((x, weight), {"x": x}, "multiple values for argument 'x'"),
        ((x, weight), {"bias": x}, "unexpected keyword argument 'bias'"),
        ((x, weight, 1e-6, scale, x), {}, "too many positional arguments"),
    ):
        with pytest.raises(TypeError, match=message):
            rms_norm(*args, **kwargs)


def test_every_operation_has_the_name_and_the_help_of_its_public_function():
    for name, operation in OPERATIONS.items():
        function = getattr(blip3o_kernels, name)
        assert function.__name__ == name
        assert function.__doc__ == operation.reference.__doc__
        assert [workload.name for workload in operation.workloads][:1] in ([], [name])


def two_norms(x, weight, scale):
    return rms_norm(torch.tanh(rms_norm(x, weight)), weight, 1e-6, scale)


@pytest.fixture
def leaves():
    return [t.requires_grad_() for t in (random(2, 5, 16), random(16, seed=1), random(2, 16, seed=2))]


def gradients(function, leaves):
    return torch.autograd.grad(function(*leaves).square().sum(), leaves)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_traces_it_whole_and_follows_the_mode(leaves, backend):
    torch._dynamo.reset()
    compiled = torch.compile(two_norms, fullgraph=True, backend=backend)
    for mode in ("triton", "torch", "triton"):
        with use_kernels(mode):
            expected, found = gradients(two_norms, leaves), gradients(compiled, leaves)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_torch_compile_takes_changing_sizes(leaves):
    torch._dynamo.reset()
    compiled = torch.compile(two_norms, fullgraph=True, backend="aot_eager", dynamic=True)
    with use_kernels("triton"):
        for N in (5, 6, 9):
            inputs = [random(2, N, 16).requires_grad_(), *leaves[1:]]
            expected, found = gradients(two_norms, inputs), gradients(compiled, inputs)
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_activation_checkpointing_gives_the_same_gradients(leaves):
    with use_kernels("triton"):
        expected = gradients(two_norms, leaves)
        found = gradients(lambda *x: checkpoint(two_norms, *x, use_reentrant=False), leaves)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_autocast_leaves_every_dtype_as_it_is(leaves):
    with use_kernels("triton"), torch.autocast(DEVICE, torch.bfloat16):
        x = torch.nn.functional.linear(leaves[0], torch.eye(16, device=DEVICE))
        y = two_norms(x, *leaves[1:])
        d_weight, d_scale = torch.autograd.grad(y.float().sum(), leaves[1:])
    assert x.dtype == y.dtype == torch.bfloat16
    assert d_weight.dtype == d_scale.dtype == torch.float32


def test_torch_func_takes_gradients(leaves):
    def loss(*inputs):
        return two_norms(*inputs).square().sum()

    with use_kernels("triton"):
        expected = gradients(two_norms, leaves)
        found = torch.func.grad(loss, argnums=(0, 1, 2))(*[x.detach() for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_second_derivative_is_refused_with_a_remedy(leaves):
    with use_kernels("triton"):
        y = two_norms(*leaves)
        (dx,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match=r"no second derivative.*use_kernels\('torch'\)"):
            dx.sum().backward()
