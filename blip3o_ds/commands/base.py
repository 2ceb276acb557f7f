"""What the commands share: the parser of one, flags made from settings, and printing a result.

A flag that stands for a setting takes type, choices and help from it, and its value is stored under the setting's name.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from blip3o_ds.config import SETTINGS, RunConfig, load_run_config, preset_names
from blip3o_ds.settings import Setting, nearest


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], dict[str, Any]], summary: str
) -> argparse.ArgumentParser:
    """A parser for the command `name`, which `run` executes; every command takes `--json`."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    parser.set_defaults(run=run, command=name)
    return parser


def add_setting(parser: argparse.ArgumentParser, name: str, flag: str | None = None) -> None:
    """A flag for the setting `name`, spelled like `--batch_size N`; by default as the setting says itself."""
    found = SETTINGS[name]
    option, _, metavar = (flag or found.flag or "").partition(" ")
    if found.table:
        parser.add_argument(option, dest=name, type=partial(_key, found), metavar=metavar, help=found.meaning)
    elif found.type is bool:
        parser.add_argument(option, dest=name, action="store_const", const=True, help=found.meaning)
    elif found.choices:
        parser.add_argument(option, dest=name, choices=found.choices, help=found.meaning)
    else:
        parser.add_argument(option, dest=name, type=found.type, metavar=metavar, help=found.meaning)


def _key(setting: Setting, text: str) -> str:
    """The type of a flag whose table is imported only when the flag is used."""
    if text not in (setting.choices or ()):
        raise argparse.ArgumentTypeError(f"{text!r} is unknown{nearest(text, setting.choices or ())}")
    return text


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings whose flags were given, by dotted name."""
    return {name: value for name, value in vars(args).items() if name in SETTINGS and value is not None}


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `load_config` reads."""
    parser.add_argument("--model_size", choices=preset_names(), help="preset to start from; base by default")
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting: train.ema_decay=0.9"
    )


def load_config(args: argparse.Namespace, preset: str | None = "base") -> RunConfig:
    """The settings that a command was given, on top of a preset."""
    return load_run_config(args.model_size or preset, args.config, args.set, given_settings(args))


def show(result: dict[str, Any]) -> dict[str, Any]:
    """Print a result as lines of `name: value`, and return it."""
    for name, value in result.items():
        print(f"{name}: {value}")
    return result
