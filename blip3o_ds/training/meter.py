"""Training metrics between two log lines: kept on the device, reduced over ranks once, with the time spent waiting.

The device is not asked for a number before the log line is due.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blip3o_ds.config import RunConfig
from blip3o_ds.data.reading.loader import Batch, EmbeddingLoader
from blip3o_ds.planning.flops import device_peak_flops, train_flops_per_sample
from blip3o_ds.training.engine import Engine, StepReport
from blip3o_kernels import FlowLoss

AVERAGED = ("loss", "velocity_similarity", "prediction_norm", "target_norm", "clip_norm", "eva_norm")
NUM_BINS = 10  # of t, in debug mode


class DebugProbe:
    """What `--debug_mode` adds: gradient norms by block (of the last step) and mean losses by ten bins of t.

    It gathers whole gradients before every step, which costs time and memory; it is not meant for long runs.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._gradient_norms: dict[str, float] = {}
        self._bins = torch.zeros(2, NUM_BINS, dtype=torch.float64)  # sums, counts

    def add(self, result: FlowLoss, t: Tensor) -> None:
        """Add a micro-batch's losses to their bins, except those that are not finite."""
        mse = result.mse.detach().double().cpu()
        finite = mse.isfinite()
        index = (t * NUM_BINS).long().clamp(max=NUM_BINS - 1).cpu()[finite]
        self._bins[0].index_add_(0, index, mse[finite])
        self._bins[1].index_add_(0, index, torch.ones(len(index), dtype=torch.float64))

    def read_gradients(self) -> None:
        """Between the last backward pass of a step and its update."""
        from deepspeed.utils import safe_get_full_grad

        squares: dict[str, float] = {}
        for name, parameter in self._engine.module.named_parameters():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                square = gradient.float().square().sum().item()
                parts = name.split(".")
                block = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
                squares[block] = squares.get(block, 0.0) + square
        self._gradient_norms = {f"grad_norm/{block}": square**0.5 for block, square in squares.items()}

    def reduce(self) -> dict[str, float]:
        """The metrics since the last call; a collective."""
        bins = self._bins.to(self._engine.device, copy=True)
        dist.all_reduce(bins)
        self._bins.zero_()
        metrics = dict(self._gradient_norms)
        for i, (total, count) in enumerate(bins.T.tolist()):
            if count:
                metrics[f"loss_by_t/{i / NUM_BINS:.1f}"] = total / count
        return metrics


class StepMeter:
    """Averages the metrics of the steps since the last `reduce`; with a `probe`, those of the debug mode too."""

    def __init__(
        self, config: RunConfig, loader: EmbeddingLoader, device: torch.device, probe: DebugProbe | None = None
    ) -> None:
        self._loader = loader
        self._device = device
        self._accumulated = config.train.gradient_accumulation_steps
        self.probe = probe
        self._num_tokens = config.model.num_tokens
        self._flops_per_sample = {  # mfu counts what the model needs, hfu what the hardware computes
            "mfu": train_flops_per_sample(config.model),
            "hfu": train_flops_per_sample(config.model, config.train.activation_checkpointing),
        }
        self.peak_flops = device_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.last: dict[str, Any] | None = None
        self.reset()
        self.exclude_pause()

    def reset(self) -> None:
        """Forget the steps since the last `reduce`."""
        self._own_spans: list[tuple[Any, Any]] = []
        self._sums = torch.zeros(len(AVERAGED), dtype=torch.float64, device=self._device)
        self._pending = torch.zeros_like(self._sums)  # of the step under way
        self._applied: list[StepReport] = []
        self._samples = 0
        self._seconds = 0.0
        self._waited = self._loader.wait_seconds

    def exclude_pause(self) -> None:
        """Do not count the time since the step ended (saving, evaluation) as training."""
        self._mark = time.monotonic()
        self._own_start: Any = self._moment()

    def add(self, batch: Batch, result: FlowLoss, t: Tensor) -> None:
        """Count one micro-batch, decoded, on the device, between its forward and its backward pass."""
        if self._own_start is not None:
            self._own_spans.append((self._own_start, self._moment()))
            self._own_start = None
        with torch.no_grad():
            norms = [x.float().norm(dim=-1).mean() for x in (batch["clip"], batch["eva"])]
            values = (*(field.mean() for field in result), *norms)
            self._pending += torch.stack(values).double()
        self._samples += len(batch.positions)
        if self.probe:
            self.probe.add(result, t)

    def finish_step(self, report: StepReport) -> None:
        """Close a step; the metrics of one that was skipped are left out, because they are not finite."""
        self._seconds += time.monotonic() - self._mark
        if report.applied:
            self._sums += self._pending
            self._applied.append(report)
        self._pending.zero_()
        self.exclude_pause()

    def reduce(self) -> dict[str, Any] | None:
        """The metrics since the last call, the same on every rank; None if every step of them was skipped."""
        if not self._applied:
            self.reset()
            return None
        replaced = torch.tensor([self._loader.num_replaced], dtype=torch.float64, device=self._device)
        totals = torch.cat([self._sums / (len(self._applied) * self._accumulated), replaced])
        dist.all_reduce(totals)
        world_size = dist.get_world_size()
        metrics: dict[str, Any] = dict(zip(AVERAGED, (totals[:-1] / world_size).tolist(), strict=True))
        rate = self._samples * world_size / self._seconds
        if self._device.type == "cuda":
            peak_bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # resident in the process
        metrics |= {
            "grad_norm": sum(report.grad_norm for report in self._applied) / len(self._applied),
            "lr": self._applied[-1].learning_rate,
            "samples_per_second": rate,
            "tokens_per_second": rate * self._num_tokens,
            "data_wait_fraction": (self._loader.wait_seconds - self._waited) / self._seconds,
            "memory_gb": peak_bytes / 2**30,
            **self._spread(),
        }
        if bad_samples := int(totals[-1]):
            metrics["bad_samples"] = bad_samples  # replaced reads of all ranks since the start
        if self.peak_flops:
            for name, flops in self._flops_per_sample.items():
                metrics[name] = rate * flops / (self.peak_flops * world_size)
        if self.probe:
            metrics |= self.probe.reduce()
        self.last = metrics
        self.reset()
        return metrics

    def _spread(self) -> dict[str, float]:
        """How far the slowest rank is behind: `own_time_max_over_median` over ranks, and which it is; a collective.

        Collectives make all ranks' steps equally long, so a rank's own time is what passes before the first of them:
        waiting for data and the first forward pass of a step (under ZeRO-3 its gathers blur this).
        """
        if self._device.type == "cuda":
            spans = [start.elapsed_time(end) / 1000 for start, end in self._own_spans]
        else:
            spans = [end - start for start, end in self._own_spans]
        own = torch.tensor([sum(spans)], dtype=torch.float64, device=self._device)
        all_own = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(all_own, own)
        seconds = torch.cat(all_own).cpu()
        slowest = int(seconds.argmax())
        return {"own_time_max_over_median": float(seconds[slowest] / seconds.median()), "slowest_rank": slowest}

    def _moment(self) -> float | torch.cuda.Event:
        """Now, on the device: the host runs ahead of a GPU."""
        if self._device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
