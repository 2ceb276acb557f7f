"""What the commands share: the parser of one, flags made from settings, and printing a result.

A flag that stands for a setting takes type, choices and help from it, and its value is stored under the setting's name.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from blip3o_ds.config import SETTINGS, RunConfig, load_run_config, preset_names
from blip3o_ds.settings import Setting, nearest
from blip3o_ds.slurm import Place, find_place

Command = Callable[[argparse.Namespace], dict[str, Any]]  # -> its result, for `--json`


def add_command(commands: Any, name: str, run: Command | str, summary: str) -> argparse.ArgumentParser:
    """A parser for the command `name`, which `run` executes; every command takes `--json`.

    As text, `run` is a function of this package, `data.tools.append:append`, which is imported when the command runs,
    takes the command's arguments by name, and returns what is to be shown.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    parser.set_defaults(run=_calling(run) if isinstance(run, str) else run, command=name)
    return parser


def own_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the command itself, named as those of the function that it calls."""
    return {name: value for name, value in vars(args).items() if name not in ("run", "command", "json", "local_rank")}


def _calling(function: str) -> Command:
    def run(args: argparse.Namespace) -> dict[str, Any]:
        module, _, name = function.partition(":")
        return show(getattr(import_module(f"blip3o_ds.{module}"), name)(**own_arguments(args)))

    return run


def find_worker() -> tuple[Place, str]:
    """The place of this process among those that share the work, and the device that it computes on."""
    import torch

    place, gpus = find_place(os.environ), torch.cuda.device_count()
    return place, f"cuda:{place.local_rank % gpus}" if gpus else "cpu"


def add_setting(parser: argparse.ArgumentParser, name: str, flag: str | None = None) -> None:
    """A flag for the setting `name`, spelled like `--batch_size N`; by default as the setting says itself."""
    found = SETTINGS[name]
    option, _, metavar = (flag or found.flag or "").partition(" ")
    how: dict[str, Any] = {"type": found.type, "metavar": metavar}
    if found.table:
        how["type"] = partial(_key, found)
    elif found.type is bool:
        how = {"action": "store_const", "const": True}
    elif found.choices:
        how = {"choices": found.choices}
    parser.add_argument(option, dest=name, help=found.meaning, **how)


def _key(setting: Setting, text: str) -> str:
    """The type of a flag whose table is imported only when the flag is used."""
    choices = setting.choices or ()
    if text not in choices:
        raise argparse.ArgumentTypeError(f"{text!r} is unknown{nearest(text, choices)}")
    return text


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings whose flags were given, by dotted name."""
    return {name: value for name, value in vars(args).items() if name in SETTINGS and value is not None}


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `load_config` reads."""
    parser.add_argument("--model_size", choices=preset_names(), help="preset to start from; base by default")
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as train.ema_decay=0.9")


def load_config(args: argparse.Namespace, preset: str | None = "base") -> RunConfig:
    """The settings that a command was given, on top of a preset."""
    return load_run_config(args.model_size or preset, args.config, args.set, given_settings(args))


def show(result: dict[str, Any]) -> dict[str, Any]:
    """Print a result as lines of `name: value`, and return it."""
    for name, value in result.items():
        print(f"{name}: {value}")
    return result
