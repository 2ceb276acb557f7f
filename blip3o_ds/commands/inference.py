"""Commands on a trained model: `eval`, `generate`, `export`; flags of the sampler replace the run's settings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip3o_ds.commands.base import add_command, add_setting, find_worker, given_settings, show
from blip3o_ds.config import SETTINGS, EvalConfig, build_run_config
from blip3o_ds.errors import ConfigError
from blip3o_ds.settings import flatten

if TYPE_CHECKING:
    from blip3o_ds.runs.pretrained import Pretrained


def add_inference_commands(commands: Any) -> None:
    p = add_command(commands, "eval", run_eval, "generate on a dataset and measure, beside baselines")
    p.add_argument("model", metavar="RUN_OR_EXPORT", type=Path)
    p.add_argument("--data", required=True, action="append", metavar="DIR", help="folder or URL; may be repeated")
    add_setting(p, "eval.max_samples", "--max_samples N")
    add_setting(p, "eval.num_samples", "--num_samples K")
    p.add_argument("--plot", type=Path, metavar="PNG", help="also draw the result")
    _add_sampler(p)

    p = add_command(commands, "generate", run_generate, "write generated embeddings as a dataset")
    p.add_argument("model", metavar="RUN_OR_EXPORT", type=Path)
    p.add_argument("--data", required=True, metavar="DIR", help="folder or URL")
    p.add_argument("--out", required=True, type=Path, metavar="DST", help="a folder; what was begun in it is finished")
    p.add_argument("--num_samples", type=int, default=1, metavar="K", help="embeddings an image; default %(default)s")
    _add_sampler(p)

    p = add_command(commands, "export", run_export, "turn a run's checkpoint into a folder for DiT.from_pretrained")
    p.add_argument("run_dir", metavar="RUN", type=Path)
    p.add_argument("dst", metavar="DST", type=Path)
    p.add_argument("--step", type=int, metavar="N", help="of the checkpoint; the newest by default")


def _add_sampler(parser: argparse.ArgumentParser) -> None:
    add_setting(parser, "eval.sampler.steps", "--steps N")
    add_setting(parser, "eval.sampler.solver", "--solver NAME")
    add_setting(parser, "eval.sampler.guidance_scale", "--guidance_scale X")
    add_setting(parser, "eval.sampler.seed", "--seed N")
    add_setting(parser, "eval.batch_size", "--batch_size N")


def _load(args: argparse.Namespace, device: str) -> tuple[Pretrained, EvalConfig]:
    """The model, and the run's settings of evaluation with the given flags in place."""
    from blip3o_ds.runs.pretrained import load_pretrained

    loaded = load_pretrained(args.model, device)
    every_sample = {"eval.max_samples": None}  # the run's setting is for evaluation during training
    layers = [flatten(loaded.config.eval.model_dump(), "eval."), every_sample, given_settings(args)]
    return loaded, build_run_config(SETTINGS.merge(layers)).eval


def run_eval(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from blip3o_ds.evaluation.plots import plot_evaluation
    from blip3o_ds.evaluation.report import evaluate, format_table

    folders = {Path(folder).absolute().name: folder for folder in args.data}
    if len(folders) < len(args.data):
        raise ConfigError("--data: two folders have the same name, and results go by the name")
    loaded, settings = _load(args, "cuda" if torch.cuda.is_available() else "cpu")
    datasets = {name: loaded.open_dataset(folder) for name, folder in folders.items()}
    results = {split: evaluate(loaded, dataset, settings) for split, dataset in datasets.items()}
    print(format_table(results))
    if args.plot:
        plot_evaluation(results, args.plot)
    return {
        "model": str(args.model),
        "step": loaded.step,
        "weights": loaded.weights,
        "evaluation": {split: result.to_dict() for split, result in results.items()},
    }


def run_generate(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.evaluation.generate import generate

    place, device = find_worker()
    loaded, settings = _load(args, device)
    source = f"{args.model.absolute().name}, step {loaded.step}, {loaded.weights} weights"
    ranks = {"rank": place.rank, "world_size": place.world_size}
    dataset = loaded.open_dataset(args.data)
    return show(generate(loaded, dataset, args.out, settings, source, num_samples=args.num_samples, **ranks))


def run_export(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.runs.pretrained import export

    export(args.run_dir, args.dst, step=args.step)
    print(f"exported to {args.dst}")
    return {"export": str(args.dst)}
