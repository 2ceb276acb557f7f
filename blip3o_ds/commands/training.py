"""Commands around a training run: `config` and `plan` before it, `train`, `slurm render`, and `compare` after it."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

from blip3o_ds.commands.base import add_command, add_config_flags, add_setting, load_config
from blip3o_ds.config import SETTINGS, preset_names
from blip3o_ds.errors import ConfigError

SBATCH_NUMBERS = "nodes", "gpus-per-node", "cpus-per-task"
SBATCH_WORDS = "time", "partition", "account", "job-name"


def add_training_commands(commands: Any) -> None:
    p = add_command(commands, "train", run_train, "train a DiT; start it with the deepspeed launcher")
    add_config_flags(p)
    for name, setting in SETTINGS.items():
        if setting.flag:
            add_setting(p, name)
    p.add_argument("--resume", nargs="?", const="latest", metavar="RUN", help="RUN, or the newest in --output_dir")
    p.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher, which sets LOCAL_RANK too

    p = add_command(commands, "config", run_config, "print every setting with its value and meaning, as a YAML file")
    add_config_flags(p)

    p = add_command(commands, "plan", run_plan, "what a run will take: parameters, FLOPs, memory")
    add_config_flags(p)
    add_setting(p, "model.token_layout")
    add_setting(p, "train.activation_checkpointing", "--activation_checkpointing")
    p.add_argument("--batch_size", type=_positive, metavar="N", help="samples per GPU and forward pass, 32 by default")
    p.add_argument("--gpus", type=_positive, default=1, metavar="N")
    p.add_argument("--gpu_memory_gb", type=_size, default=80, metavar="X", help="of one GPU, for the recommendation")
    p.add_argument("--zero_stage", type=int, default=2, choices=[0, 1, 2, 3])

    p = add_command(commands, "compare", run_compare, "finished runs side by side, or the runs of a matrix of settings")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("runs", metavar="RUN", nargs="*", type=Path, default=[], help="run folders")
    what.add_argument("--matrix", type=Path, metavar="FILE", help="YAML file: train, evaluate and compare its variants")
    of_matrix = p.add_argument_group("with --matrix")
    of_matrix.add_argument("--out", type=Path, metavar="DIR", help="runs and report; default compare_NAME")
    of_matrix.add_argument("--train", metavar="DIR", help="the training set, in place of the file's")
    of_matrix.add_argument("--eval", metavar="DIR", action="append", default=[], help="a held-out set; may be repeated")
    of_matrix.add_argument("--num_processes", metavar="N", type=_positive, help="default: the GPUs, 2 without any")
    of_matrix.add_argument("--dry_run", action="store_true", help="only print the runs and their steps")

    slurm = commands.add_parser("slurm", help="job scripts for SLURM").add_subparsers(required=True, metavar="COMMAND")
    p = add_command(slurm, "render", run_slurm_render, "print scripts/train_clip_repro.job, filled in")
    for name in SBATCH_NUMBERS:
        p.add_argument(f"--{name}", metavar="N", type=_positive)
    for name in SBATCH_WORDS:
        p.add_argument(f"--{name}", metavar="HH:MM:SS" if name == "time" else "NAME")
    add_setting(p, "data.train_dir")
    add_setting(p, "train.deepspeed_config")
    p.add_argument("--output_dir", metavar="DIR", help="where runs are kept, in a folder named after the job")
    p.add_argument("--model_size", choices=preset_names())
    p.add_argument("--modules", metavar='"A B"', help="arguments of `module load`")


def run_train(args: argparse.Namespace) -> dict[str, Any]:
    preset = None if args.resume else "base"  # a resumed run has its own settings already
    config = load_config(args, preset)  # before the heavy import, so that a wrong setting is reported at once
    from blip3o_ds.training.loop import train

    return train(config, args.resume)


def run_config(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.flow.flow import check_flow

    config = load_config(args)
    check_flow(config)  # a ConfigError names what is unknown
    print(SETTINGS.to_yaml(config))
    return {
        name: {
            "value": attrgetter(name)(config),
            "meaning": setting.meaning,
            "flag": setting.flag and setting.flag.split()[0],
            "may_change_on_resume": setting.may_change,
            "from_data": setting.from_data,
            "excludes": setting.excludes,
            "choices": setting.choices,
        }
        for name, setting in SETTINGS.items()
    }


def run_plan(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.flow.flow import check_flow
    from blip3o_ds.planning.flops import train_flops_per_sample
    from blip3o_ds.planning.memory import count_parameters, estimate_memory, recommend_zero

    config = load_config(args)
    check_flow(config)  # a ConfigError names what is unknown
    train, checkpointing = config.train, config.train.activation_checkpointing
    batch = args.batch_size or (train.micro_batch_size if "micro_batch_size" in train.model_fields_set else 32)
    step: dict[str, Any] = {"world_size": args.gpus, "micro_batch_size": batch, "precision": train.precision}
    step |= {"activation_checkpointing": checkpointing, "ema": train.ema_decay > 0}
    memory = estimate_memory(config.model, zero_stage=args.zero_stage, **step)
    recommended, needs = recommend_zero(config.model, gpu_memory_gb=args.gpu_memory_gb, **step)
    plan: dict[str, Any] = {
        "parameters": count_parameters(config.model),
        "train_tflops_per_sample": train_flops_per_sample(config.model, checkpointing) / 1e12,
        "memory_gb": {name: getattr(memory, name) / 2**30 for name in (*memory.__dataclass_fields__, "total")},
        "deepspeed_config": recommended,
        "deepspeed_config_gb": needs,
    }
    print(f"{args.model_size or 'base'}: {plan['parameters'] / 1e6:.1f} M parameters")
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
        reason = f"fits with the least communication; ZeRO-3 would save {saved:.2f} GiB and send half as much again"
    return f"--deepspeed_config ds_configs/{recommended}, {reason}"


def run_compare(args: argparse.Namespace) -> dict[str, Any]:
    if args.matrix:
        return _run_matrix(args)
    for name in ("out", "train", "eval", "num_processes", "dry_run"):
        if getattr(args, name):
            raise ConfigError(f"--{name} goes with --matrix, and run folders were given")
    from blip3o_ds.evaluation.compare import compare, format_comparison

    comparison = compare(args.runs)
    print(format_comparison(comparison))
    return comparison.to_dict()


def _run_matrix(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.evaluation.matrix import load_matrix
    from blip3o_ds.evaluation.matrix_report import REPORT
    from blip3o_ds.training.matrix import default_processes, plan_tasks, run_matrix

    matrix = load_matrix(args.matrix, args.train, args.eval)
    out = args.out or Path(f"compare_{matrix.name}")
    processes = args.num_processes or default_processes()
    if args.dry_run:
        tasks = plan_tasks(matrix, out, processes)
        steps = sum(task.steps - task.done for task in tasks if not task.finished)
        for task in tasks:
            print(f"{task.run.name}: {task.state}")
        print(f"{steps} steps in all, on {processes} processes")
        return {"runs": {task.run.name: task.state for task in tasks}, "steps": steps, "processes": processes}
    result = run_matrix(matrix, out, processes, shlex.join(sys.argv))
    print((out / REPORT).read_text(encoding="utf-8"))
    return result


def run_slurm_render(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.planning.job_script import render_job

    script = render_job(
        {name: getattr(args, name.replace("-", "_")) for name in (*SBATCH_NUMBERS, *SBATCH_WORDS)},
        {
            "DATA_DIR": getattr(args, "data.train_dir"),
            "OUTPUT_DIR": args.output_dir,
            "MODEL_SIZE": args.model_size,
            "DEEPSPEED_CONFIG": getattr(args, "train.deepspeed_config"),
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


def _size(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text}")
    return value
