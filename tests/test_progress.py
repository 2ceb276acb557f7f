"""A long job reports where it is: calmly in a log, on one line of a terminal."""

from __future__ import annotations

import logging
import sys

import pytest

from blip3o_ds import progress as progress_module
from blip3o_ds.progress import Progress, format_duration


@pytest.fixture
def clock(monkeypatch):
    """Sets the times at which the clock is read."""

    def set_times(*times: float) -> None:
        readings = iter(times)
        monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(readings))

    return set_times


def test_progress_is_logged_at_most_every_ten_seconds(clock, caplog):
    clock(0, 5, 12, 13, 30)
    caplog.set_level(logging.INFO)
    progress = Progress("generating", 100)
    for done in (10, 24, 30, 60):
        progress.at(done)
    assert caplog.messages == [
        "generating: 24 of 100 images, 2/s, 38s left",
        "generating: 60 of 100 images, 2/s, 20s left",
    ]


def test_what_was_done_before_does_not_count_towards_the_rate(clock, caplog):
    clock(0, 10, 20)
    caplog.set_level(logging.INFO)
    progress = Progress("encoding", 100, start=40)
    progress.resume_at(50)
    progress.at(60, "half of the rest")
    assert caplog.messages == ["encoding: half of the rest, 40s left"]
    assert progress.seconds_left(75) == 20


def test_items_are_counted_as_they_are_done(clock, caplog):
    clock(0, 10, 20, 30)
    caplog.set_level(logging.INFO)
    assert list(Progress("verify", 3, "shards").over("abc")) == ["a", "b", "c"]
    assert [message.split(",")[0] for message in caplog.messages] == [
        f"verify: {done} of 3 shards" for done in (1, 2, 3)
    ]


def test_a_terminal_shows_one_line_that_is_removed_at_the_end(clock, monkeypatch, capsys, caplog):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    clock(0, 1, 1.1, 2)
    assert list(Progress("split", 3, "shards").over("abc")) == ["a", "b", "c"]
    clear = "\r\x1b[K"
    assert capsys.readouterr().err == f"{clear}split: 1 of 3 shards, 1/s, 2s left{clear}{clear}"
    assert caplog.messages == []


@pytest.mark.parametrize(("seconds", "text"), [(5.4, "5s"), (75, "1m15s"), (4000, "1h06m")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text
