"""The job script, filled in."""

from __future__ import annotations

import subprocess

import pytest

from blip3o_ds.cli import main
from blip3o_ds.errors import ConfigError
from blip3o_ds.planning.job_script import TEMPLATE, render_job


def changed_lines(script: str) -> set[str]:
    return set(script.splitlines()) - set(TEMPLATE.read_text().splitlines())


def test_only_what_was_given_is_replaced():
    script = render_job({"nodes": 3, "gpus-per-node": 8, "partition": "gpu", "time": None}, {"MODEL_SIZE": "large"})

    assert changed_lines(script) == {
        "#SBATCH --nodes=3",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --partition=gpu",
        'MODEL_SIZE="${MODEL_SIZE:-large}"',
    }


def test_nothing_given_leaves_the_shipped_script(capsys):
    assert main(["slurm", "render"]) == 0
    assert capsys.readouterr().out == TEMPLATE.read_text()


@pytest.mark.parametrize("path", ["/data/my set", "/data/$HOME", '/data/"q"', "/data/`id`", "/data/a}b", "/d/\\n"])
def test_a_path_reaches_the_script_as_it_was_written(path):
    line = next(line for line in changed_lines(render_job({}, {"DATA_DIR": path})))

    shown = subprocess.run(["bash", "-c", f'{line}\nprintf %s "$DATA_DIR"'], capture_output=True, text=True, env={})
    assert shown.stdout == path


def test_a_value_that_sbatch_would_cut_is_refused():
    with pytest.raises(ConfigError, match="--account 'my group'"):
        render_job({"account": "my group"}, {})


@pytest.mark.parametrize("time", ["30", "30:00", "2:30:00", "1-0", "1-12:30", "1-12:30:00", "UNLIMITED"])
def test_a_time_limit_is_as_sbatch_takes_it(time):
    assert f"#SBATCH --time={time}" in changed_lines(render_job({"time": time}, {}))


@pytest.mark.parametrize("time", ["tomorrow", "2h", "1:2:3:4", "-1", "1-"])
def test_another_time_limit_is_refused(time):
    with pytest.raises(ConfigError, match=f"--time '{time}': expected a limit as sbatch takes it"):
        render_job({"time": time}, {})


@pytest.mark.parametrize("flag", ["--gpus", "--batch_size", "--gpu_memory_gb"])
@pytest.mark.parametrize("value", ["0", "-4", "nan", "many"])
def test_a_plan_for_nothing_is_refused(flag, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", flag, value])

    assert stopped.value.code == 2
    assert f"argument {flag}: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train_clip_repro", "extract_embeddings", "evaluate"])
def test_the_job_scripts_are_bash(name):
    checked = subprocess.run(["bash", "-n", TEMPLATE.with_name(f"{name}.job")], capture_output=True, text=True)

    assert checked.returncode == 0, checked.stderr
