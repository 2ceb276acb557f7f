"""The command `blip3o-ds`: parses arguments, runs the command, and turns errors into messages and exit statuses.

With `--json` the last line printed is one JSON object. Exit status 0: done, 1: failed, 2: wrong usage.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from blip3o_ds.commands.data import add_data_commands
from blip3o_ds.commands.inference import add_inference_commands
from blip3o_ds.commands.training import add_training_commands
from blip3o_ds.errors import Blip3oError, ConfigError


def main(arguments: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None) -> int:
    """Run one command, by default of `blip3o-ds`, and return its exit status."""
    parser = parser or build_parser()
    args = parser.parse_args(arguments)
    if args.command != "train":  # which has its own logging
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    json_wanted = args.json and int(os.environ.get("RANK", 0)) == 0
    try:
        result = args.run(args)
    except (Blip3oError, OSError) as error:  # an OSError's message (no space, no permission) names the file
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        if json_wanted:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}), flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    if json_wanted:
        print(json.dumps(result), flush=True)
    return 0


def command(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command, and end the process with its exit status.

    A rank that fails leaves threads of its process group; in the interpreter's own end they may abort the process,
    whose status then is 134, and a job script takes wrong settings for a failure that another start may mend.
    """
    status = main(arguments)
    distributed = sys.modules.get("torch.distributed")
    if status and distributed is not None and distributed.is_initialized():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="blip3o-ds", description="Train DiTs that generate CLIP embeddings from EVA.")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # from the launcher, which sets LOCAL_RANK too
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_training_commands(commands)
    add_inference_commands(commands)
    data = commands.add_parser("data", help="make, check and look at datasets")
    add_data_commands(data.add_subparsers(required=True, metavar="COMMAND"))
    return parser


if __name__ == "__main__":
    command()
