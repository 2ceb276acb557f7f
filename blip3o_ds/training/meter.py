"""Training metrics between two log lines: kept on the device, reduced over ranks once, with the time spent waiting.

The device is not asked for a number before the log line is due.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blip3o_ds.config import RunConfig
from blip3o_ds.data.reading.loader import Batch, EmbeddingLoader
from blip3o_ds.planning.flops import device_peak_flops, train_flops_per_sample
from blip3o_ds.training.debug import DebugProbe
from blip3o_ds.training.engine import StepReport
from blip3o_kernels import FlowLoss

AVERAGED = ("loss", "velocity_similarity", "prediction_norm", "target_norm", "clip_norm", "eva_norm")


class StepMeter:
    """Averages the metrics of the steps since the last `reduce`; with a `probe`, those of the debug mode too."""

    def __init__(
        self, config: RunConfig, loader: EmbeddingLoader, device: torch.device, probe: DebugProbe | None = None
    ) -> None:
        self._loader = loader
        self._device = device
        self._probe = probe
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
        self._batches = self._pending_batches = self._samples = 0
        self._seconds = 0.0
        self._grad_norms: list[float] = []
        self._learning_rate = 0.0
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
        self._pending_batches += 1
        self._samples += len(batch.positions)
        if self._probe:
            self._probe.add(result, t)

    def before_update(self) -> None:
        """In debug mode, read the gradients; after the last backward pass of a step."""
        if self._probe:
            self._probe.read_gradients()

    def finish_step(self, report: StepReport) -> None:
        """Close a step; the metrics of one that was skipped are left out, because they are not finite."""
        self._seconds += time.monotonic() - self._mark
        if report.applied:
            self._sums += self._pending
            self._batches += self._pending_batches
            self._grad_norms.append(report.grad_norm)
            self._learning_rate = report.learning_rate
        self._pending.zero_()
        self._pending_batches = 0
        self.exclude_pause()

    def reduce(self) -> dict[str, Any] | None:
        """The metrics since the last call, the same on every rank; None if every step of them was skipped."""
        if not self._batches:
            self.reset()
            return None
        replaced = torch.tensor([self._loader.num_replaced], dtype=torch.float64, device=self._device)
        totals = torch.cat([self._sums / self._batches, replaced])
        dist.all_reduce(totals)
        world_size = dist.get_world_size()
        metrics: dict[str, Any] = dict(zip(AVERAGED, (totals[:-1] / world_size).tolist(), strict=True))
        rate = self._samples * world_size / self._seconds
        metrics |= {
            "grad_norm": sum(self._grad_norms) / len(self._grad_norms),
            "lr": self._learning_rate,
            "samples_per_second": rate,
            "tokens_per_second": rate * self._num_tokens,
            "data_wait_fraction": (self._loader.wait_seconds - self._waited) / self._seconds,
            "memory_gb": peak_memory_gb(self._device),
            **self._spread(),
        }
        if bad_samples := int(totals[-1]):
            metrics["bad_samples"] = bad_samples  # replaced reads of all ranks since the start
        if self.peak_flops:
            for name, flops in self._flops_per_sample.items():
                metrics[name] = rate * flops / (self.peak_flops * world_size)
        if self._probe:
            metrics |= self._probe.reduce()
        self.last = metrics
        self.reset()
        return metrics

    def _spread(self) -> dict[str, float]:
        """How far the slowest rank is behind: `own_time_max_over_median` over ranks, and which it is; a collective.

        Collectives make all ranks' steps equally long, so a rank's own time is what passes before the first of them:
        waiting for data and the first forward pass of a step (under ZeRO-3 its gathers blur this).
        """
        own = torch.tensor([sum(map(self._span_seconds, self._own_spans))], dtype=torch.float64, device=self._device)
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

    def _span_seconds(self, span: tuple[Any, Any]) -> float:
        start, end = span
        return start.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - start


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this rank in GiB: allocated on the GPU, or resident in the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
