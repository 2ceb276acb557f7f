"""A whole training step of the DiT for `bench_kernels.py`: forward, loss, backward, AdamW, without DeepSpeed.

Weights are bf16 with fp32 copies that AdamW updates, as in a bf16 run; torch.compile has the model whole. Triton's
kernels and plain PyTorch differ only in `use_kernels`.
"""

from __future__ import annotations

import torch

from benchmarks.measure import Rates, Task, Timer, alternate, peak_memory
from benchmarks.providers import OURS
from benchmarks.runner import Step
from blip3o_ds.baselines.fit import BASIS_WIDTH, FOLDS
from blip3o_ds.config import FlowConfig, ModelConfig, get_blip3o_clip_config
from blip3o_ds.flow.flow import Flow
from blip3o_ds.flow.prior import LinearGaussian
from blip3o_ds.model.dit import DiT
from blip3o_ds.planning.flops import train_flops_per_sample
from blip3o_kernels import use_kernels

BATCHES = {"base": 64, "large": 32}  # small enough that four processes compile at once on 80 GB
MODES = {OURS: "triton", "pytorch": "torch"}  # provider -> mode of the kernels


class TrainStep:
    """Call it to train one step on the same random batch."""

    def __init__(self, config: ModelConfig, batch_size: int, mode: str, device: str = "cuda", compiled: bool = True):
        torch.manual_seed(0)
        self.mode = mode
        with torch.device(device):
            model = DiT(config).to(device, torch.bfloat16)
            for parameter in model.parameters():
                if not parameter.any():  # open gates: products with zeros draw less power and run faster
                    torch.nn.init.normal_(parameter, std=0.02)
            sizes = batch_size, config.num_tokens
            clip, noise = (torch.randn(*sizes, config.clip_dim) for _ in range(2))
            eva = torch.randn(*sizes, config.eva_dim, dtype=torch.bfloat16)
            t, drop = torch.rand(batch_size), torch.rand(batch_size) < 0.1
            held = torch.rand(batch_size) < 0.01
        self.batch = clip, eva, noise, t, drop, [0] * batch_size, held
        self.weights = list(model.parameters())
        self.masters = [w.detach().float().requires_grad_() for w in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=device == "cuda")
        self.model = torch.compile(model, fullgraph=True) if compiled else model
        self.objective = Flow.from_config(FlowConfig(), plain_prior(config, device))

    def __call__(self) -> torch.Tensor:
        """The loss of this step, before its update."""
        with use_kernels(self.mode):
            loss = self.objective.loss(self.model, *self.batch).loss
            gradients = torch.autograd.grad(loss, self.weights)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.float()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return loss.detach()


def plain_prior(config: ModelConfig, device: str) -> LinearGaussian:
    """A prior of the size of a fitted one, for embeddings of unit variance; its work does not depend on its values."""
    width, features = min(BASIS_WIDTH, config.eva_dim), config.eva_dim + 9 * min(BASIS_WIDTH, config.eva_dim) + 1
    with torch.device(device):
        return LinearGaussian(
            eva_mean=torch.zeros(config.eva_dim),
            eva_std=torch.ones(config.eva_dim),
            basis=torch.eye(config.eva_dim)[:, :width],
            weight=torch.zeros(features, config.clip_dim),
            fold_weights=torch.zeros(FOLDS, features, config.clip_dim),
            channels=torch.eye(config.clip_dim),
            variance=torch.ones(config.num_tokens, config.clip_dim),
        )


def time_steps(presets: list[str], timer: Timer, rates: Rates, rounds: int) -> list[Step]:
    """Both providers of every preset, in turn."""
    found = []
    for preset in presets:
        torch.compiler.reset()
        config, batch_size = get_blip3o_clip_config(preset), BATCHES[preset]
        steps = {provider: TrainStep(config, batch_size, mode) for provider, mode in MODES.items()}
        for step in steps.values():
            step()  # compiles
        tasks = {provider: Task(lambda _, step=step: step()) for provider, step in steps.items()}
        timings = alternate(tasks, timer, rounds, seconds=20)
        flops = train_flops_per_sample(config) * batch_size
        for provider, timing in timings.items():
            speed = {"samples_per_s": batch_size / timing.median, "mfu": flops / timing.median / rates.matmul}
            memory = peak_memory(steps[provider]) / 2**20
            row = preset, batch_size, config.num_tokens, provider
            found.append(Step(*row, **timing.milliseconds(), **speed, peak_memory_mib=memory))
        del steps, tasks
        torch.cuda.empty_cache()
    return found


def compile_step(preset: str, provider: str) -> None:
    """Fill the compilers' caches on disk, in a process of its own."""
    TrainStep(get_blip3o_clip_config(preset), BATCHES[preset], MODES[provider])()
