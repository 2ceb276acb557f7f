"""Fills in the SLURM job script `scripts/train_clip_repro.job`: its `#SBATCH` options and its settings.

That script is the only copy, so what is rendered is what is tested.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from blip3o_ds.errors import ConfigError

_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}|infinite|unlimited", re.IGNORECASE)
TEMPLATE = Path(__file__).parent.parent.parent / "scripts" / "train_clip_repro.job"


def render_job(directives: Mapping[str, object], settings: Mapping[str, object], template: Path = TEMPLATE) -> str:
    """The job script with these `#SBATCH` options and defaults of its variables; None leaves the script's own.

    `gpus-per-node` sets `ntasks-per-node` too. Raises ConfigError for a value that sbatch would misread.
    """
    try:
        text = template.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{template} is missing; install the project from a checkout: pip install -e .") from None
    given = {name: value for name, value in directives.items() if value is not None}
    if "gpus-per-node" in given:
        given["ntasks-per-node"] = given["gpus-per-node"]
    for name, value in given.items():
        if re.search(r"\s", str(value)) or value == "":
            raise ConfigError(f"--{name} {str(value)!r}: expected a single word")
        if name == "time" and not _TIME.fullmatch(str(value)):
            raise ConfigError(
                f"--time {str(value)!r}: expected a limit as sbatch takes it: minutes, H:MM:SS or D-HH:MM"
            )
        text = _replace_line(text, rf"##?SBATCH --{re.escape(name)}=.*", f"#SBATCH --{name}={value}")
    for name, value in settings.items():
        if value is not None:
            default = re.sub(r"([\\}\"$`])", r"\\\1", str(value))  # the shell must not expand it
            text = _replace_line(text, rf"{name}=\$\{{{name}:-.*\}}", f'{name}="${{{name}:-{default}}}"')
    return text


def _replace_line(text: str, pattern: str, line: str) -> str:
    text, count = re.subn(rf"^{pattern}$", lambda _: line, text, flags=re.MULTILINE)
    assert count == 1, f"{pattern} occurs {count} times in the job script"
    return text
