"""The flow of a run, checked against the rest of its settings.

Called before anything is opened, so that a wrong name costs no waiting.
"""

from __future__ import annotations

from blip3o_ds.config import RunConfig
from blip3o_ds.errors import ConfigError
from blip3o_ds.flow.flow import Flow
from blip3o_ds.flow.solvers import SOLVERS
from blip3o_ds.tables import choose


def build_flow(config: RunConfig) -> Flow:
    """The flow of a run, once every name that it and the sampler are given is known and fits the model.

    Raises:
        ConfigError: naming the setting, its value and what is valid.
    """
    flow = Flow.from_config(config.flow)
    choose(SOLVERS, config.eval.sampler.solver, "eval.sampler.solver")
    if config.model.linear_skip != "none" and not flow.prediction.outputs_clean:
        raise ConfigError(
            f"model.linear_skip = {config.model.linear_skip} maps EVA to the clean embedding, and flow.prediction = "
            f"{config.flow.prediction} does not output it; set flow.prediction to sample or model.linear_skip to none"
        )
    return flow
