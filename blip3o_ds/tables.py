"""Choices by name: a table maps the name that a setting takes to what it stands for.

Adding a choice is one line in its table, from inside the package or from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from blip3o_ds.errors import ConfigError
from blip3o_ds.settings import nearest

T = TypeVar("T")


def choose(table: Mapping[str, T], name: str, setting: str) -> T:
    """The entry `name` of `table`.

    Raises:
        ConfigError: there is none; names the setting, the nearest name and all valid ones.
    """
    if name in table:
        return table[name]
    raise ConfigError(f"{setting} = {name!r} is unknown{nearest(name, list(table))}")
