"""Commands on datasets: make, extend, check, repair and look at them."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from blip3o_ds.commands.base import add_command, find_worker, own_arguments, show
from blip3o_ds.config import TokenLayout
from blip3o_ds.errors import DataError


def add_data_commands(commands: Any) -> None:
    p = add_command(commands, "convert", run_convert, "turn pickled embedding shards, or a dataset, into a dataset")
    p.add_argument("src", metavar="SRC", help="pickles, or a dataset's folder or URL")
    p.add_argument("dst", metavar="DST", type=Path)
    _add_storage(p)
    p = add_command(commands, "extract", run_extract, "turn images into a dataset of embeddings")
    p.add_argument("images", metavar="IMAGES", type=Path, help="a folder of images or of webdataset tars")
    p.add_argument("dst", metavar="DST", type=Path)
    for name, example in (("condition", "eva-clip-8b"), ("target", "clip-vit-l14")):
        p.add_argument(f"--{name}", required=True, metavar="ENCODER", help=f"for example {example}")
        p.add_argument(f"--{name}_weights", metavar="DIR", help="local folder or hub name")
    p.add_argument("--trust_remote_code", action="store_true", help="run the model code that comes with the weights")
    p.add_argument("--batch_size", type=int, default=16, metavar="N")
    _add_storage(p)
    p = add_command(commands, "demo", "encoders.demo:build_demo", "make the demo set from scikit-image's photographs")
    p.add_argument("dst", metavar="DST", type=Path)
    p = add_command(
        commands, "photographs", "encoders.photo_set:build_photo_set", "make a larger demo set from Debian's packages"
    )
    p.add_argument("dst", metavar="DST", type=Path)
    p = add_command(commands, "append", "data.tools.append:append", "add the shards of other datasets to one, in place")
    p.add_argument("dataset_dir", metavar="DIR", type=Path)
    p.add_argument("sources", metavar="SRC", type=Path, nargs="+")
    p = add_command(commands, "split", "data.tools.split:split", "divide a dataset into DST/train and DST/eval")
    p.add_argument("location", metavar="DIR", help="folder or URL")
    p.add_argument("dst", metavar="DST", type=Path)
    p.add_argument("--fraction", type=float, default=0.05, metavar="X", help="held out; default %(default)s")
    _add_views(p)
    p = add_command(commands, "verify", run_verify, "check every shard, index and sample of a dataset")
    p.add_argument("dataset_dir", metavar="DIR", help="folder or URL")
    _add_workers(p)
    p = add_command(commands, "repair", run_repair, "rebuild indexes, and rewrite shards without bad samples, in place")
    p.add_argument("dataset_dir", metavar="DIR", type=Path)
    _add_workers(p)
    p = add_command(commands, "stats", "data.tools.stats:stats", "sizes and per-channel statistics of a dataset")
    p.add_argument("dataset_dir", metavar="DIR", help="folder or URL")
    p = add_command(commands, "inspect", "data.tools.stats:inspect", "show a dataset's specification, or a sample")
    p.add_argument("dataset_dir", metavar="DIR", help="folder or URL")
    p.add_argument("key", metavar="KEY", nargs="?")


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--training_mode", dest="token_layout", choices=get_args(TokenLayout), help="tokens to store")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32", "fp8-e4m3"])
    parser.add_argument("--samples_per_shard", type=int, default=512, metavar="N")
    _add_views(parser)


def _add_views(parser: argparse.ArgumentParser) -> None:
    meaning = "keys are an image's name, TEXT and the number of a view, such as a crop; a split divides the images"
    parser.add_argument("--view_separator", metavar="TEXT", help=meaning)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="shards read at a time; default the cores, at most 8")


def run_convert(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.data.tools.convert import convert, is_dataset

    result = convert(**own_arguments(args))
    if is_dataset(args.src) and result["source_dtype"] != args.dtype:
        from blip3o_ds.baselines.fit import ridge_cost

        result["cost"]["ridge"] = ridge_cost(args.src, args.dst, args.token_layout)
    return show(result)


def run_extract(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.encoders.extract import extract

    place, device = find_worker()
    args.token_layout = args.token_layout or "patch_only"
    return show(extract(**own_arguments(args), device=device, rank=place.rank, world_size=place.world_size))


def run_verify(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.data.tools.verify import verify

    report = verify(**own_arguments(args))
    for problem in report.problems:
        print(problem)
    if report.problems:
        found = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        raise DataError(f"{args.dataset_dir}: {found} found, listed above")
    return show(report.to_dict())


def run_repair(args: argparse.Namespace) -> dict[str, Any]:
    from blip3o_ds.data.tools.repair import repair

    return show(asdict(repair(**own_arguments(args))))
