"""The overfit test: whether a network has memorised the few samples it was given, and if not, what to look at first.

The causes are excluded in this order: bug, data, learning rate, time; capacity remains. A cause is what
the evidence points at, not a proof; the numbers are in the verdict, so that anyone can judge them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from blip3o_ds.config import RunConfig, TrainConfig
from blip3o_ds.evaluation.plots import read_metrics
from blip3o_ds.evaluation.report import EvalResult
from blip3o_ds.planning.memory import count_parameters
from blip3o_ds.runs.folder import METRICS
from blip3o_ds.training.curve import SIGNIFICANT, Curve
from blip3o_ds.training.overfit_data import ALIKE, DataFacts, data_facts
from blip3o_ds.training.peers import on_rank_zero

if TYPE_CHECKING:
    from blip3o_ds.training.setup import Run

logger = logging.getLogger(__name__)

THRESHOLD = 0.9  # of `clip_similarity` of the posterior mean
AGREEMENT = 0.02  # of the samples' similarity with it, unless theirs is above the threshold too

FELL = 0.2  # share of the first loss: a network that took off so much has learnt something
GROWTH = 3.0  # of the gradient's norm, from the first third to the last
LITTLE_TRAVEL = 0.01  # new weights have standard deviations of 0.01 to 0.04
LOW_RATE = 1e-4  # below what AdamW usually needs for networks of this size
MARGIN = 1.2  # on top of extrapolated steps
NOISE_LEFT = 1.1  # norm of samples, over the true one: above it they are not clean
LEAST_ERROR = 1e-4  # of a similarity; less is rounding
FAR = 10.0  # times the steps so far; what needs longer is flat


class Finding(NamedTuple):
    """A cause (None if the test passed), with its evidence in words, and one thing to do about it."""

    cause: str | None
    text: str
    advice: str


@dataclass(frozen=True)
class Measured:
    """All that the causes are judged by."""

    posterior_mean: float  # `clip_similarity`
    sampled: float
    sampled_norm_ratio: float  # norm of the samples over that of the true embeddings
    not_finite: int  # lines whose loss or gradient is not
    curve: Curve | None  # None: no line is finite
    data: DataFacts
    config: RunConfig

    @property
    def score(self) -> float:
        """The similarity that is too low."""
        return self.posterior_mean if self.posterior_mean <= THRESHOLD else self.sampled

    @property
    def passed(self) -> bool:
        agree = self.sampled > THRESHOLD or abs(self.posterior_mean - self.sampled) <= AGREEMENT
        return self.posterior_mean > THRESHOLD and agree

    @property
    def steps_to_threshold(self) -> float | None:
        """Further steps at the last third's pace, roughly; None if the loss does not fall there, or is lost in noise.

        The best guess with the squared error e, relative to the embedding's square, has the cosine sqrt(1 - e). The
        error is taken to fall as the loss does.
        """
        curve = self.curve
        if curve is None or curve.loss_trend is None or curve.loss_trend_error is None:
            return None
        if curve.loss_trend >= -SIGNIFICANT * curve.loss_trend_error:
            return None
        error = 1 - max(self.score, 0.0) ** 2
        return math.log(error / (1 - THRESHOLD**2)) / -curve.loss_trend

    def evidence(self) -> dict[str, float]:
        """The numbers, by name."""
        model = self.config.model
        sizes = {
            "hidden_size": model.hidden_size,
            "clip_dim": model.clip_dim,
            "num_parameters": count_parameters(model),
        }
        curve = {} if self.curve is None else asdict(self.curve)
        found = {"lines_not_finite": self.not_finite, **curve, **self.data.numbers(), **sizes}
        found["sampled_norm_ratio"] = self.sampled_norm_ratio
        found["steps_to_threshold"] = None if self.passed else self.steps_to_threshold
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class OverfitVerdict:
    """Whether the samples were memorised; if not, the cause that the evidence points at, and one thing to do."""

    posterior_mean: float  # `clip_similarity`
    sampled: float
    passed: bool
    cause: str | None  # None if it passed
    evidence: dict[str, float]
    finding: str  # the evidence for the cause, in words
    advice: str
    threshold: float = THRESHOLD

    def log(self) -> None:
        """Say it in three lines, or one if there is nothing to do."""
        logger.info(
            "overfit test: clip_similarity %.3f (posterior mean), %.3f (sampled), %.3f (untrained); threshold %.1f %s",
            *(self.posterior_mean, self.sampled, self.evidence["untrained"], self.threshold),
            "reached" if self.passed else "NOT reached",
        )
        if self.finding:
            logger.info("overfit test: %s%s", f"{self.cause}: " if self.cause else "", self.finding)
        if self.advice:
            logger.info("overfit test: to do: %s", self.advice)


def overfit_verdict(run: Run, result: EvalResult) -> dict[str, Any]:
    """The verdict on a run's last evaluation, on every rank; it is logged. A collective: rank 0 reads what it needs."""

    def work() -> OverfitVerdict:
        history = [line for line in read_metrics(run.folder / METRICS) if line["kind"] == "train"]
        return diagnose(history, result, data_facts(run), run.config)

    verdict = on_rank_zero(work)
    verdict.log()
    return asdict(verdict)


def diagnose(
    history: Sequence[Mapping[str, float]], result: EvalResult, data: DataFacts, config: RunConfig
) -> OverfitVerdict:
    """The verdict on training lines with `step`, `loss`, `grad_norm` and `lr`, and the evaluation after them."""
    finite = [line for line in history if math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])]
    measured = Measured(
        posterior_mean=result.readings["posterior_mean"]["clip_similarity"],
        sampled=result.readings["sampled"]["clip_similarity"],
        sampled_norm_ratio=result.readings["sampled"]["norm_ratio"],
        not_finite=len(history) - len(finite),
        curve=Curve.of(finite) if finite else None,
        data=data,
        config=config,
    )
    checks = (_passed,) if measured.passed else CHECKS
    found = next(filter(None, (check(measured) for check in checks)))
    return OverfitVerdict(
        posterior_mean=measured.posterior_mean,
        sampled=measured.sampled,
        passed=measured.passed,
        cause=found.cause,
        evidence=measured.evidence(),
        finding=found.text,
        advice=found.advice,
    )


def _passed(found: Measured) -> Finding:
    if found.data.untrained <= THRESHOLD:
        return Finding(None, "", "")
    text = "a network that has learnt nothing passes too, by what the prior knows, so the test says nothing here"
    return Finding(None, text, "test on other samples")


def _bug(found: Measured) -> Finding | None:
    curve = found.curve
    if curve is None or found.not_finite:
        text = f"loss or gradient is not finite in {found.not_finite} lines of {METRICS}"
        return Finding("bug", text, "find the block where it begins, with --debug_mode and --set train.precision=fp32")
    if curve.grad_norm_least == 0:
        text = "the gradient's norm is exactly 0 at some step: the loss does not depend on the weights there"
        return Finding("bug", text, "find the block without a gradient, with --debug_mode")
    if curve.is_still and curve.lr_travel >= LITTLE_TRAVEL:
        text = (
            f"the loss never moves, from {curve.loss_start:.3g} to {curve.loss_end:.3g}, although the gradient's norm "
            f"is {curve.grad_norm_end:.2g} and the learning rates add up to {curve.lr_travel:.2g}"
        )
        return Finding("bug", text, "check that the optimizer updates the weights that the forward pass uses")
    fall = 1 - curve.loss_end / curve.loss_start
    if fall > FELL and found.posterior_mean <= found.data.untrained:
        text = (
            f"the loss fell by {fall:.0%}, but the evaluation is no better than an untrained network's "
            f"{found.data.untrained:.3f}: it does not see what training sees"
        )
        return Finding("bug", text, "see whether the moving average is at fault, with --set train.ema_decay=0")
    return None


def _data(found: Measured) -> Finding | None:
    data = found.data
    if data.target_variation < ALIKE:
        text = f"the targets are constant: they differ by {data.target_variation:.1g} of their norm"
        return Finding("data", text, "look at the targets with `blip3o-ds data stats DIR`")
    unavoidable = 1 - data.ceiling
    if unavoidable < max(THRESHOLD - found.score, LEAST_ERROR):
        return None
    if data.zero_targets > unavoidable / 2:
        text = f"{data.zero_targets:.1%} of the target tokens are zero, so nothing exceeds {data.ceiling:.3f}"
        return Finding("data", text, "extract those embeddings again; `blip3o-ds data verify DIR` checks the set")
    text = (
        f"{data.contradictions} pairs of samples, such as {' and '.join(data.example)}, have equal EVA embeddings and "
        f"different CLIP ones, so nothing exceeds {data.ceiling:.3f}"
    )
    return Finding("data", text, "remove one sample of each pair, or extract them again")


def _learning_rate(found: Measured) -> Finding | None:
    curve, rate = _curve(found), found.config.train.learning_rate
    fell = 1 - curve.loss_end / curve.loss_start
    if curve.rises or (curve.grad_norm_growth > GROWTH and fell < FELL):
        text = (
            f"the averaged loss rises by up to {curve.loss_rise:.0%}, in {curve.loss_jumps} jumps, and the gradient's "
            f"norm grows {curve.grad_norm_growth:.2g}-fold, at a peak of {curve.lr_peak:.1e}"
        )
        return Finding("learning_rate_too_high", text, f"--learning_rate {rate / 3:.1e}, a third of it")
    if curve.lr_peak < LOW_RATE and curve.lr_travel < LITTLE_TRAVEL and fell < 0.5:
        text = (
            f"the loss fell by only {fell:.1%} in {curve.steps} steps: the learning rate peaks at {curve.lr_peak:.1e}, "
            f"and the weights cannot have moved further than {curve.lr_travel:.1e}"
        )
        return Finding("learning_rate_too_low", text, f"--learning_rate {TrainConfig().learning_rate:.1e}, the default")
    return None


def _noise(found: Measured) -> Finding | None:
    """Samples that are noisy although the mean is known; more time would hardly help a network that is too narrow.

    To follow the flow, a network has to output the noise that is in its input, all of its channels.
    """
    model = found.config.model
    noisy = found.posterior_mean > THRESHOLD and found.sampled_norm_ratio > NOISE_LEFT
    if not noisy or model.hidden_size >= model.clip_dim:
        return None
    text = (
        f"the posterior mean is memorised, but samples keep noise (norm {found.sampled_norm_ratio:.2f} times the true "
        f"one): a network of hidden_size {model.hidden_size} cannot carry noise {model.clip_dim} wide"
    )
    return Finding("capacity", text, _wider(found.config))


def _time(found: Measured) -> Finding | None:
    curve, more = _curve(found), found.steps_to_threshold
    if curve.loss_trend is None:
        text = f"{curve.lines} lines of metrics in {curve.steps} steps are too few to tell"
        return Finding("time", text, _longer(found.config, 10))
    if more is not None and more <= FAR * curve.steps:
        text = (
            f"the loss is {curve.loss_end:.3g} and still falls, by {_percent(curve)} a step at the mean learning rate "
            f"in the last third; at that pace the threshold is about {_rounded(more)} steps away"
        )
        return Finding("time", text, _longer(found.config, 1 + MARGIN * more / curve.steps))
    if curve.lr_travel < LITTLE_TRAVEL:
        text = f"in {curve.steps} steps the weights cannot have moved further than {curve.lr_travel:.1e}"
        return Finding("time", text, _longer(found.config, 10))
    return None


def _capacity(found: Measured) -> Finding:
    curve, model = _curve(found), found.config.model
    text = (
        f"the loss is flat at {curve.loss_end:.3g} (it falls by {_percent(curve)} a step in the last third) "
        f"while gradients are healthy (norm {curve.grad_norm_end:.2g}); hidden_size {model.hidden_size} for embeddings "
        f"{model.clip_dim} wide, {count_parameters(model) / 1e6:.1f} M parameters"
    )
    if model.hidden_size < model.clip_dim:
        return Finding("capacity", text, _wider(found.config))
    return Finding("capacity", text, f"more layers: --set model.num_layers={2 * model.num_layers}")


def _wider(config: RunConfig) -> str:
    """How to make the network as wide as the embeddings."""
    unit = 2 * config.model.num_heads  # of whose multiples rotary positions can rotate pairs in every head
    return f"--set model.hidden_size={math.ceil(config.model.clip_dim / unit) * unit}"


def _percent(curve: Curve) -> str:
    fall, error = -100 * (curve.loss_trend or 0.0), 100 * (curve.loss_trend_error or 0.0)
    return f"{fall:.2g} +- {error:.2g} %"


def _curve(found: Measured) -> Curve:
    assert found.curve is not None  # `_bug` comes first
    return found.curve


def _longer(config: RunConfig, factor: float) -> str:
    """How to train so many times as long."""
    train = config.train
    if train.max_steps is not None:
        return f"--set train.max_steps={_rounded(factor * train.max_steps)}"
    return f"--num_epochs {_rounded(factor * (10 if train.num_epochs is None else train.num_epochs))}"


def _rounded(steps: float) -> int:
    """Upwards to two digits."""
    unit = 10 ** max(math.floor(math.log10(max(steps, 1))) - 1, 0)
    return math.ceil(steps / unit) * unit


CHECKS: Sequence[Callable[[Measured], Finding | None]] = (_bug, _data, _learning_rate, _noise, _time, _capacity)
