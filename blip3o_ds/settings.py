"""What a setting is: a field of a typed section that states its meaning, its flag, and whether it may change.

No setting is named here. `config.py` declares them with `setting`; `Settings` reads them back for `--help`,
`blip3o-ds config`, the layers of a configuration, and the suggestions in its errors.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blip3o_ds.errors import ConfigError

NEAR = 0.75  # difflib's ratio from which two names are near enough for a suggestion
T = TypeVar("T")


class Section(BaseModel):
    """Settings that belong together."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def setting(default: Any, meaning: str, aliases: str = "", **given: Any) -> Any:
    """A pydantic field that states everything about a setting.

    `aliases` are other names that people try, with spaces between; the rest are pydantic's `ge`, `gt`, `le` and `lt`,
    and fields of `Setting`.
    """
    facts: dict[str, Any] = {"aliases": aliases.split()}
    facts |= {name: given.pop(name) for name in [*given] if name in Setting.__dataclass_fields__}
    return Field(default, description=meaning, json_schema_extra=facts, **given)


@dataclass(frozen=True)
class Setting:
    """One setting by its dotted name, with what `setting` was told about it."""

    name: str
    type: Any  # without None
    default: Any
    meaning: str
    aliases: list[str]  # for the suggestion in an error
    flag: str | None = None  # of `train`, as its help shows it: `--batch_size N`
    table: str | None = None  # where the names that it can have are keys: `blip3o_ds.flow.solvers:SOLVERS`
    excludes: str | None = None  # the dotted name of another setting: only one of the two can have a value
    may_change: bool = False  # a resumed run may have another value
    from_data: bool = False  # if it is not given, the training set decides; the default is what the planner assumes

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """The values it can have, if they are few; looking up those of a table imports its module."""
        if self.table:
            module, _, name = self.table.partition(":")
            return tuple(getattr(import_module(module), name))
        return get_args(self.type) if get_origin(self.type) is Literal else None

    @property
    def remarks(self) -> str:
        """What is to be said besides its meaning."""
        remarks = [self.choices and " | ".join(self.choices), self.from_data and "from the data unless given"]
        remarks += [self.excludes and f"excludes {self.excludes}", self.flag]
        return ", ".join(str(remark) for remark in [*remarks, self.may_change and "may change on resume"] if remark)


class Settings(dict[str, Setting]):
    """The settings of a schema by dotted name, in its order."""

    def __init__(self, schema: type[BaseModel]) -> None:
        super().__init__({found.name: found for found in _read(schema)})

    def merge(self, layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Nested settings from layers of dotted ones; a later layer replaces what an earlier one says."""
        merged: dict[str, Any] = {}
        for layer in layers:
            replaced = {self[name].excludes for name, value in layer.items() if name in self and value is not None}
            for name, value in {**dict.fromkeys(filter(None, replaced)), **layer}.items():
                _set(merged, name, value)
        return merged

    def explain(self, error: ValidationError) -> str:
        """All problems in one line, each with the name of its setting."""
        return "; ".join(self._explain(item) for item in error.errors())

    def to_yaml(self, values: BaseModel) -> str:
        """A configuration file that states `values`, each with its meaning."""
        lines: list[str] = []
        above: list[str] = []
        for name, found in self.items():
            *path, last = name.split(".")
            lines += [f"{'  ' * i}{part}:" for i, part in enumerate(path) if path[: i + 1] != above[: i + 1]]
            above = path
            given = "# " if found.from_data else ""  # in a file it would be given, and the data would have to agree
            line = f"{'  ' * len(path)}{given}{last}: {json.dumps(attrgetter(name)(values))}"
            lines.append(f"{line:<40}  # {found.meaning}{found.remarks and f' ({found.remarks})'}")
        return "\n".join(lines)

    def _explain(self, item: Any) -> str:
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            unknown = [*flatten({name: item["input"]})] or [name]  # the settings in it, if it is a section
            return "; ".join(f"{path} is not a setting; {self._suggestion(path)}" for path in unknown)
        if item["type"] == "value_error":  # from a validator of the schema, which names the settings itself
            return str(item["ctx"]["error"])
        return f"{name} = {item['input']!r}: {item['msg'].lower()}"

    def _suggestion(self, name: str) -> str:
        section, _, last = name.rpartition(".")
        for found in self.values():
            if last in found.aliases and section in ("", found.name.rpartition(".")[0]):
                return f"did you mean {found.name}?"
        sections = {path.rpartition(".")[0] for path in self} - {""}
        likeness = {path: _likeness(last, path.rpartition(".")[2]) for path in [*self, *sorted(sections)]}
        best = max(likeness, key=lambda path: (likeness[path], _likeness(name, path)))
        return f"did you mean {best}?" if likeness[best] >= NEAR else "`blip3o-ds config` prints all settings"


def flatten(settings: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one layer of dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def read_yaml(path: Path, kind: str, schema: type[BaseModel]) -> dict[str, Any]:
    """The top level of a YAML file that `schema` describes, unchecked; ConfigError if it is no YAML or no mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {kind} file") from None
    except OSError as error:
        raise ConfigError(f"{path}: expected a {kind} file, which cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{path}: expected the fields {', '.join(schema.model_fields)}, found {content!r}")
    return content or {}


def parse_override(text: str) -> dict[str, Any]:
    """The layer that `--set section.key=value` makes."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: expected section.key=value, for example train.ema_decay=0.999")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {name}: {value!r} is not a YAML value: {error}") from None
    if isinstance(parsed, str):
        with suppress(ValueError):
            parsed = float(parsed)  # YAML 1.1 reads 5e-4 as text, people mean the number
    return {name.strip(): parsed}


def nearest(name: str, valid: Sequence[str]) -> str:
    """The end of an error about a name that is not one of a few valid ones."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=NEAR)
    return f"{f'; did you mean {near[0]}?' if near else ''}; valid: {', '.join(valid)}"


def choose(table: Mapping[str, T], name: str, setting: str) -> T:
    """The entry `name` of `table`; a ConfigError names the setting, the nearest name and all valid ones."""
    if name in table:
        return table[name]
    raise ConfigError(f"{setting} = {name!r} is unknown{nearest(name, list(table))}")


def _read(schema: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    for name, field in schema.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _read(kind, f"{prefix}{name}.")
            continue
        if get_origin(kind) is UnionType:
            kind = next(part for part in get_args(kind) if part is not type(None))
        facts: Any = field.json_schema_extra or {}
        yield Setting(prefix + name, kind, field.default, field.description or "", **facts)


def _set(settings: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"{name}: {section} is a value, not a section")
    settings[key] = value


def _likeness(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, name, other).ratio()
