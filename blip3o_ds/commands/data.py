"""Commands on datasets: make, extend, check, repair and look at them."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blip3o_ds.commands.base import add_command, show
from blip3o_ds.errors import DataError


def add_data_commands(commands: Any) -> None:
    p = add_command(commands, "convert", run_convert, "turn pickled embedding shards, or a dataset, into a dataset")
    p.add_argument("src", metavar="SRC", help="pickles, or a dataset's folder or URL")
    p.add_argument("dst", metavar="DST", type=Path)
    _add_storage(p)
    p = add_command(commands, "extract", run_extract, "turn images into a dataset of embeddings")
    p.add_argument("images", metavar="IMAGES", type=Path, help="a folder of images or of webdataset tars")
    p.add_argument("dst", metavar="DST", type=Path)
    p.add_argument("--condition", required=True, metavar="ENCODER", help="for example eva-clip-8b")
    p.add_argument("--target", required=True, metavar="ENCODER", help="for example clip-vit-l14")
    p.add_argument("--condition_weights", metavar="DIR", help="local folder or hub name")
    p.add_argument("--target_weights", metavar="DIR", help="local folder or hub name")
    p.add_argument("--trust_remote_code", action="store_true", help="run the model code that comes with the weights")
    p.add_argument("--batch_size", type=int, default=16, metavar="N")
    _add_storage(p)
    p = add_command(commands, "demo", run_demo, "make the demo set from photographs that come with scikit-image")
    p.add_argument("dst", metavar="DST", type=Path)
    p = add_command(commands, "append", run_append, "add the shards of other datasets to one, without rewriting them")
    p.add_argument("dir", metavar="DIR", type=Path)
    p.add_argument("src", metavar="SRC", type=Path, nargs="+")
    p = add_command(
        commands, "split", run_split, "divide a dataset by key into DST/train and DST/eval, without copying it"
    )
    p.add_argument("dir", metavar="DIR", help="folder or URL")
    p.add_argument("dst", metavar="DST", type=Path)
    p.add_argument(
        "--fraction", type=float, default=0.05, metavar="X", help="held out in DST/eval; default %(default)s"
    )
    p = add_command(commands, "verify", run_verify, "check every shard, index and sample of a dataset")
    p.add_argument("dir", metavar="DIR", help="folder or URL")
    p.add_argument("--workers", type=int, metavar="N", help="shards read at a time; by default one a core, at most 8")
    p = add_command(
        commands, "repair", run_repair, "rebuild indexes, and write shards again without their bad samples, in place"
    )
    p.add_argument("dir", metavar="DIR", type=Path)
    p.add_argument("--workers", type=int, metavar="N", help="shards read at a time; by default one a core, at most 8")
    p = add_command(commands, "stats", run_stats, "sizes and per-channel statistics of a dataset")
    p.add_argument("dir", metavar="DIR", help="folder or URL")
    p = add_command(commands, "inspect", run_inspect, "show a dataset's specification, or one sample")
    p.add_argument("dir", metavar="DIR", help="folder or URL")
    p.add_argument("key", metavar="KEY", nargs="?")


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--training_mode", choices=["patch_only", "cls_patch"], help="token layout to store")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32", "fp8-e4m3"])
    parser.add_argument("--samples_per_shard", type=int, default=512, metavar="N")


def run_convert(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.data.tools.convert import convert, is_dataset

    result = convert(
        args.src,
        args.dst,
        token_layout=args.training_mode,
        dtype=args.dtype,
        samples_per_shard=args.samples_per_shard,
    )
    if is_dataset(args.src) and result["source_dtype"] != args.dtype:
        from blip3o_ds.baselines import ridge_cost

        result["cost"]["ridge"] = ridge_cost(args.src, args.dst, args.training_mode)
    return show(result)


def run_extract(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.encoders.extract import extract
    from blip3o_ds.slurm import find_place

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
    return show(result)


def _device(local_rank: int) -> str:
    import torch

    return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def run_demo(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.encoders.demo import build_demo

    return show(build_demo(args.dst))


def run_append(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.data.tools.append import append

    return show(append(args.dir, args.src))


def run_split(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.data.tools.split import split

    return show(split(args.dir, args.dst, args.fraction))


def run_verify(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.data.tools.verify import verify

    report = verify(args.dir, args.workers)
    for problem in report.problems:
        print(problem)
    if report.problems:
        found = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        raise DataError(f"{args.dir}: {found} found, listed above")
    return show(report.to_dict())


def run_repair(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.data.tools.repair import repair

    return show(asdict(repair(args.dir, args.workers)))


def run_stats(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.data.tools.stats import stats

    return show(stats(args.dir))


def run_inspect(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.data.tools.stats import inspect

    return show(inspect(args.dir, args.key))
