"""Metrics on disk, before and after a resume."""

import json

from blip3o_ds.progress import format_duration
from blip3o_ds.training.telemetry import MetricsWriter, drop_lines_after


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_has_every_step_once(tmp_path):
    first = MetricsWriter(tmp_path, rank=0)
    for step in range(1, 6):
        first.train(step, {"loss": float(step)})
    first.close()

    second = MetricsWriter(tmp_path, rank=0, resumed_step=3)
    for step in range(4, 7):
        second.train(step, {"loss": 10.0 * step})
    second.close()

    assert [(line["step"], line["loss"]) for line in read(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
        (5, 50.0),
        (6, 60.0),
    ]


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')

    drop_lines_after(path, 9)

    assert read(path) == [{"step": 1}]


def test_other_ranks_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, rank=1)
    writer.train(1, {"loss": 1.0})
    writer.close()

    assert not list(tmp_path.iterdir())


def test_tensorboard_has_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, rank=0)
    writer.train(1, {"loss": 0.5})
    writer.evaluation(1, "heldout", "sampled", {"clip_similarity": 0.25})
    writer.close()

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5)]
    assert events.Scalars("eval_heldout/sampled/clip_similarity")[0].value == 0.25


def test_durations_read_as_people_say_them():
    assert [format_duration(s) for s in (9.4, 75, 4000)] == ["9s", "1m15s", "1h06m"]
