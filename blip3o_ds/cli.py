"""The command `blip3o-ds`: parses arguments, calls the library, prints the result.

Every command takes `--json`: the last line printed is then one JSON object. Exit status 0 done, 1 failed, 2 wrong
usage.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blip3o_ds.config import EvalConfig, build_run_config, get_blip3o_clip_config, load_run_config, preset_names
from blip3o_ds.errors import Blip3oError, ConfigError, DataError

TRAIN_FLAGS = {  # flag -> setting
    "chunked_embeddings_dir": "data.train_dir",
    "output_dir": "train.output_dir",
    "training_mode": "model.token_layout",
    "batch_size": "train.micro_batch_size",
    "num_epochs": "train.num_epochs",
    "learning_rate": "train.learning_rate",
    "max_shards": "data.max_shards",
    "overfit_test_size": "train.overfit_test_size",
    "deepspeed_config": "train.deepspeed_config",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = build_parser().parse_args(arguments)
    if args.command != ("train",):
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    try:
        result = args.run(args)
    except (Blip3oError, OSError) as error:  # of an OSError (no space, no permission) the message has the file's name
        print(f"blip3o-ds: error: {error}", file=sys.stderr)
        if args.json and _rank() == 0:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}), flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    if args.json and _rank() == 0:
        print(json.dumps(result), flush=True)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="blip3o-ds", description=__doc__.splitlines()[0])
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher adds it; LOCAL_RANK says the same
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_inference(commands)
    _add_plan(commands)
    _add_compare(commands)
    slurm = commands.add_parser("slurm", help="job scripts for SLURM").add_subparsers(required=True, metavar="COMMAND")
    _add_slurm(slurm)
    data = commands.add_parser("data", help="make, check and look at datasets").add_subparsers(
        required=True, metavar="COMMAND"
    )
    _add_data(data)
    return parser


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    parser.set_defaults(run=run, command=(name,))
    return parser


def _add_train(commands: Any) -> None:
    p = _command(commands, "train", run_train, "train a DiT; start it with the deepspeed launcher")
    p.add_argument("--chunked_embeddings_dir", metavar="DIR", help="the training set: a folder with a manifest.json")
    p.add_argument("--output_dir", metavar="DIR", help="where runs are kept")
    p.add_argument("--model_size", default="base", choices=preset_names())
    p.add_argument("--training_mode", choices=["patch_only", "cls_patch"])
    p.add_argument("--batch_size", type=int, metavar="N", help="samples per rank and forward pass")
    p.add_argument("--num_epochs", type=int, metavar="N")
    p.add_argument("--learning_rate", type=float, metavar="X")
    p.add_argument("--max_shards", type=int, metavar="N", help="use the first N shards alone")
    p.add_argument("--overfit_test_size", type=int, metavar="N", help="train and evaluate on the first N samples alone")
    p.add_argument("--debug_mode", action="store_true", help="log gradient norms by block and loss by timestep")
    p.add_argument("--config", metavar="FILE", help="YAML file with settings")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting: train.ema_decay=0.999")
    p.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed JSON; ds_configs/ has ready ones")
    p.add_argument("--resume", nargs="?", const="latest", metavar="RUN", help="go on with the newest run, or with RUN")
    p.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it; LOCAL_RANK says the same


def run_train(args: argparse.Namespace) -> dict:
    flags = {setting: getattr(args, flag) for flag, setting in TRAIN_FLAGS.items()}
    flags["train.debug_mode"] = args.debug_mode or None
    config = load_run_config(args.model_size, args.config, args.set, flags)
    from blip3o_ds.training.loop import train

    return train(config, args.resume)


def _add_inference(commands: Any) -> None:
    p = _command(commands, "eval", run_eval, "generate on a dataset and measure, beside two baselines")
    p.add_argument("model", metavar="RUN_OR_EXPORT", type=Path)
    p.add_argument(
        "--data", required=True, action="append", metavar="DIR", help="folder or URL; may be given several times"
    )
    p.add_argument("--max_samples", type=int, metavar="N")
    p.add_argument("--plot", type=Path, metavar="PNG", help="also draw the result")
    _add_sampler(p)
    p = _command(commands, "generate", run_generate, "write generated embeddings as a dataset")
    p.add_argument("model", metavar="RUN_OR_EXPORT", type=Path)
    p.add_argument("--data", required=True, metavar="DIR", help="folder or URL")
    p.add_argument("--out", required=True, type=Path, metavar="DST")
    _add_sampler(p)
    p = _command(commands, "export", run_export, "turn a run's checkpoint into a folder for DiT.from_pretrained")
    p.add_argument("run_dir", metavar="RUN", type=Path)
    p.add_argument("dst", metavar="DST", type=Path)
    p.add_argument("--step", type=int, metavar="N", help="of the checkpoint; the newest by default")


def _add_sampler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, help="of the solver; by default as the run was configured")
    parser.add_argument("--solver", choices=["euler", "midpoint", "heun"])
    parser.add_argument("--guidance_scale", type=float, metavar="X")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--batch_size", type=int, metavar="N")


def _load(args: argparse.Namespace) -> tuple[Any, EvalConfig]:
    """The model, and the settings of its evaluation with the command's flags in place."""
    import torch

    from blip3o_ds.runs.pretrained import load_pretrained

    loaded = load_pretrained(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    flags = {name: getattr(args, name) for name in ("steps", "solver", "guidance_scale", "seed", "batch_size")}
    given = {name: value for name, value in flags.items() if value is not None}
    settings = loaded.config.eval.model_dump()
    settings["batch_size"] = given.pop("batch_size", settings["batch_size"])
    settings["sampler"] |= given
    settings["max_samples"] = getattr(args, "max_samples", None)
    return loaded, build_run_config({"eval": settings}).eval


def run_eval(args: argparse.Namespace) -> dict:
    from blip3o_ds.evaluation.plots import plot_evaluation
    from blip3o_ds.evaluation.report import evaluate, format_table

    folders = {Path(folder).absolute().name: folder for folder in args.data}
    if len(folders) < len(args.data):
        raise ConfigError("--data: two folders have the same name, and results go by the name")
    loaded, settings = _load(args)
    datasets = {name: loaded.open_dataset(folder) for name, folder in folders.items()}
    results = {}
    for split, dataset in datasets.items():
        results[split] = evaluate(loaded, dataset, settings)
    print(format_table(results))
    if args.plot:
        plot_evaluation(results, args.plot)
    return {
        "model": str(args.model),
        "step": loaded.step,
        "weights": loaded.weights,
        "evaluation": {split: result.to_dict() for split, result in results.items()},
    }


def run_generate(args: argparse.Namespace) -> dict:
    from blip3o_ds.evaluation.generate import generate

    loaded, settings = _load(args)
    result = generate(
        loaded,
        loaded.open_dataset(args.data),
        args.out,
        settings,
        source=f"{args.model.absolute().name}, step {loaded.step}, {loaded.weights} weights",
    )
    return _show(result)


def run_export(args: argparse.Namespace) -> dict:
    from blip3o_ds.runs.pretrained import export

    export(args.run_dir, args.dst, step=args.step)
    print(f"exported to {args.dst}")
    return {"export": str(args.dst)}


def _add_compare(commands: Any) -> None:
    p = _command(commands, "compare", run_compare, "finished runs side by side: settings that differ, and metrics")
    p.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="two run folders or more")


def run_compare(args: argparse.Namespace) -> dict:
    from blip3o_ds.evaluation.compare import compare, format_comparison

    comparison = compare(args.runs)
    print(format_comparison(comparison))
    return comparison.to_dict()


def _add_plan(commands: Any) -> None:
    p = _command(commands, "plan", run_plan, "what a run will cost: parameters, FLOPs, memory")
    p.add_argument("--model_size", default="base", choices=preset_names())
    p.add_argument("--training_mode", default="patch_only", choices=["patch_only", "cls_patch"])
    p.add_argument("--batch_size", type=int, default=32, metavar="N", help="samples per GPU and forward pass")
    p.add_argument("--gpus", type=int, default=1, metavar="N")
    p.add_argument("--gpu_memory_gb", type=float, default=80, metavar="X", help="of one GPU, for the recommendation")
    p.add_argument("--zero_stage", type=int, default=2, choices=[0, 1, 2, 3])
    p.add_argument("--activation_checkpointing", action="store_true")


def run_plan(args: argparse.Namespace) -> dict:
    from blip3o_ds.planning.flops import train_flops_per_sample
    from blip3o_ds.planning.memory import count_parameters, estimate_memory, recommend_zero

    model = get_blip3o_clip_config(args.model_size, args.training_mode)
    memory = estimate_memory(
        model,
        zero_stage=args.zero_stage,
        world_size=args.gpus,
        micro_batch_size=args.batch_size,
        precision="bf16",
        activation_checkpointing=args.activation_checkpointing,
        ema=True,
    )
    recommended, needs = recommend_zero(
        model,
        gpu_memory_gb=args.gpu_memory_gb,
        world_size=args.gpus,
        micro_batch_size=args.batch_size,
        activation_checkpointing=args.activation_checkpointing,
    )
    plan = {
        "parameters": count_parameters(model),
        "train_tflops_per_sample": train_flops_per_sample(model, args.activation_checkpointing) / 1e12,
        "memory_gb": {name: getattr(memory, name) / 2**30 for name in (*memory.__dataclass_fields__, "total")},
        "deepspeed_config": recommended,
        "deepspeed_config_gb": needs,
    }
    print(f"{args.model_size}: {plan['parameters'] / 1e6:.1f} M parameters")
    print(f"train step: {plan['train_tflops_per_sample']:.3f} TFLOP a sample")
    for name, value in plan["memory_gb"].items():
        print(f"{name:>12}: {value:7.2f} GiB per GPU")
    print("on " + ", ".join(f"{name} {need:.2f}" for name, need in needs.items()) + " GiB per GPU")
    print(f"of {args.gpu_memory_gb:g} GiB: {_zero_advice(recommended, needs)}")
    return plan


def _zero_advice(recommended: str | None, needs: dict[str, float]) -> str:
    if recommended is None:
        return "nothing fits; lower --batch_size, or add --activation_checkpointing"
    reason = "the least communication among those that fit"
    if recommended == "zero1.json":
        saved = needs["zero1.json"] - needs["zero3.json"]
        reason = f"fits with the least communication; ZeRO-3 would save {saved:.2f} GiB for half as much traffic again"
    return f"--deepspeed_config ds_configs/{recommended}, {reason}"


SBATCH_OPTIONS = {  # sbatch's name -> what it is
    "nodes": "N",
    "gpus-per-node": "N",
    "cpus-per-task": "N",
    "time": "HH:MM:SS",
    "partition": "NAME",
    "account": "NAME",
    "job-name": "NAME",
}


def _add_slurm(commands: Any) -> None:
    p = _command(commands, "render", run_slurm_render, "print scripts/train_clip_repro.job, filled in")
    for name, metavar in SBATCH_OPTIONS.items():
        p.add_argument(f"--{name}", metavar=metavar, type=_positive if metavar == "N" else str)
    p.add_argument("--chunked_embeddings_dir", metavar="DIR", help="the training set")
    p.add_argument("--output_dir", metavar="DIR", help="where runs are kept, in a folder of the job's name")
    p.add_argument("--model_size", choices=preset_names())
    p.add_argument("--deepspeed_config", metavar="FILE")
    p.add_argument("--modules", metavar='"A B"', help="what `module load` takes")


def run_slurm_render(args: argparse.Namespace) -> dict:
    from blip3o_ds.planning.job_script import render_job

    script = render_job(
        {name: getattr(args, name.replace("-", "_")) for name in SBATCH_OPTIONS},
        {
            "DATA_DIR": args.chunked_embeddings_dir,
            "OUTPUT_DIR": args.output_dir,
            "MODEL_SIZE": args.model_size,
            "DEEPSPEED_CONFIG": args.deepspeed_config,
            "MODULES": args.modules,
        },
    )
    print(script, end="")
    return {"script": script}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text}")
    return value


def _add_data(commands: Any) -> None:
    p = _command(commands, "convert", run_convert, "turn pickled embedding shards, or a dataset, into a dataset")
    p.add_argument("src", metavar="SRC", help="pickles, or a dataset's folder or URL")
    p.add_argument("dst", metavar="DST", type=Path)
    _add_storage(p)
    p = _command(commands, "extract", run_extract, "turn images into a dataset of embeddings")
    p.add_argument("images", metavar="IMAGES", type=Path, help="a folder of images or of webdataset tars")
    p.add_argument("dst", metavar="DST", type=Path)
    p.add_argument("--condition", required=True, metavar="ENCODER", help="for example eva-clip-8b")
    p.add_argument("--target", required=True, metavar="ENCODER", help="for example clip-vit-l14")
    p.add_argument("--condition_weights", metavar="DIR", help="local folder or hub name")
    p.add_argument("--target_weights", metavar="DIR", help="local folder or hub name")
    p.add_argument("--trust_remote_code", action="store_true", help="run the model code that comes with the weights")
    p.add_argument("--batch_size", type=int, default=16, metavar="N")
    _add_storage(p)
    p = _command(commands, "demo", run_demo, "make the demo set from photographs that come with scikit-image")
    p.add_argument("dst", metavar="DST", type=Path)
    p = _command(commands, "append", run_append, "add the shards of other datasets to one, without rewriting them")
    p.add_argument("dir", metavar="DIR", type=Path)
    p.add_argument("src", metavar="SRC", type=Path, nargs="+")
    p = _command(
        commands, "split", run_split, "divide a dataset by key into DST/train and DST/eval, without copying it"
    )
    p.add_argument("dir", metavar="DIR", help="folder or URL")
    p.add_argument("dst", metavar="DST", type=Path)
    p.add_argument(
        "--fraction", type=float, default=0.05, metavar="X", help="held out in DST/eval; default %(default)s"
    )
    p = _command(commands, "verify", run_verify, "check every shard, index and sample of a dataset")
    p.add_argument("dir", metavar="DIR", help="folder or URL")
    p.add_argument("--workers", type=int, metavar="N", help="shards read at a time; by default one a core, at most 8")
    p = _command(
        commands, "repair", run_repair, "rebuild indexes, and write shards again without their bad samples, in place"
    )
    p.add_argument("dir", metavar="DIR", type=Path)
    p.add_argument("--workers", type=int, metavar="N", help="shards read at a time; by default one a core, at most 8")
    p = _command(commands, "bench", run_bench, "time the loader beside other ways of reading and the memory's speed")
    p.add_argument("dir", metavar="DIR", type=Path, nargs="?", help="a dataset; by default a temporary one is made")
    p = _command(commands, "stats", run_stats, "sizes and per-channel statistics of a dataset")
    p.add_argument("dir", metavar="DIR", help="folder or URL")
    p = _command(commands, "inspect", run_inspect, "show a dataset's specification, or one sample")
    p.add_argument("dir", metavar="DIR", help="folder or URL")
    p.add_argument("key", metavar="KEY", nargs="?")


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--training_mode", choices=["patch_only", "cls_patch"], help="token layout to store")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32", "fp8-e4m3"])
    parser.add_argument("--samples_per_shard", type=int, default=512, metavar="N")


def run_convert(args: argparse.Namespace) -> dict:
    from blip3o_ds.data.tools.convert import convert, is_dataset

    result = convert(
        args.src,
        args.dst,
        token_layout=args.training_mode,
        dtype=args.dtype,
        samples_per_shard=args.samples_per_shard,
    )
    if is_dataset(args.src) and result["source_dtype"] != args.dtype:
        from blip3o_ds.evaluation.storage import ridge_cost

        result["cost"]["ridge"] = ridge_cost(args.src, args.dst, args.training_mode)
    return _show(result)


def run_extract(args: argparse.Namespace) -> dict:
    from blip3o_ds.encoders.extract import extract
    from blip3o_ds.encoders.place import find_place

    place = find_place(os.environ)
    result = extract(
        args.images,
        args.dst,
        condition=args.condition,
        target=args.target,
        condition_weights=args.condition_weights,
        target_weights=args.target_weights,
        token_layout=args.training_mode or "patch_only",
        dtype=args.dtype,
        samples_per_shard=args.samples_per_shard,
        batch_size=args.batch_size,
        trust_remote_code=args.trust_remote_code,
        device=_device(place.local_rank),
        rank=place.rank,
        world_size=place.world_size,
    )
    return _show(result)


def _device(local_rank: int) -> str:
    import torch

    return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def run_demo(args: argparse.Namespace) -> dict:
    from blip3o_ds.encoders.demo import build_demo

    return _show(build_demo(args.dst))


def run_append(args: argparse.Namespace) -> dict:
    from blip3o_ds.data.tools.append import append

    return _show(append(args.dir, args.src))


def run_split(args: argparse.Namespace) -> dict:
    from blip3o_ds.data.tools.split import split

    return _show(split(args.dir, args.dst, args.fraction))


def run_verify(args: argparse.Namespace) -> dict:
    from blip3o_ds.data.tools.verify import verify

    report = verify(args.dir, args.workers)
    for problem in report.problems:
        print(problem)
    if report.problems:
        raise DataError(f"{args.dir}: {len(report.problems)} problems found, listed above")
    return _show(report.to_dict())


def run_repair(args: argparse.Namespace) -> dict:
    from blip3o_ds.data.tools.repair import repair

    return _show(asdict(repair(args.dir, args.workers)))


def run_bench(args: argparse.Namespace) -> dict:
    from blip3o_ds.data.tools.bench import bench, format_bench

    result = bench(args.dir)
    print(format_bench(result))
    return result


def run_stats(args: argparse.Namespace) -> dict:
    from blip3o_ds.data.tools.verify import stats

    return _show(stats(args.dir))


def run_inspect(args: argparse.Namespace) -> dict:
    from blip3o_ds.data.tools.verify import inspect

    return _show(inspect(args.dir, args.key))


def _show(result: dict) -> dict:
    for name, value in result.items():
        print(f"{name}: {value}")
    return result


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


if __name__ == "__main__":
    sys.exit(main())
