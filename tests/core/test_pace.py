"""What a training says of its end, by a clock that the test turns."""

import re
from datetime import datetime, timedelta

from efficient_vdit_core.training.pace import Pace


def told(seconds, steps, done=0, processes=1):
    """What is said after each step; the first ones take a minute each."""
    now = [0.0]
    pace = Pace(steps, done, processes, clock=lambda: now[0])
    lines = []
    for step in range(steps - done):
        now[0] += 60 if step < 3 else seconds
        lines.append(pace.after_step())
    return lines


def test_the_end_is_told_once_after_two_minutes_at_full_pace():
    lines = told(10.0, 1000, done=100)
    assert [i + 1 for i, line in enumerate(lines) if line] == [15]  # three slow steps, then twelve of ten seconds
    line = next(filter(None, lines))
    assert line.startswith("10.00 s a step: it will end about ") and "after 2.5 hours, sample" in line
    said = datetime.strptime(
        re.search(r"about \w+ (\d+ \w+ \d+:\d+)", line)[1] + f" {datetime.now().year}", "%d %b %H:%M %Y"
    )
    assert abs(said - datetime.now() - timedelta(seconds=8850)) < timedelta(minutes=2) or said.month == 1


def test_processes_cost_together():
    line = next(filter(None, told(10.0, 1000, processes=8)))
    assert "after 2.8 hours on each of 8, 22.2 together" in line


def test_steps_that_a_stop_would_not_wait_for_are_told(monkeypatch):
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    long = dict(seconds=25.0, steps=1000, processes=8)
    assert "leave 30 s to end such a step and save: set TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in "".join(told(**long))
    for other in ({"seconds": 15.0}, {"processes": 1}):
        assert "SIGTERM" not in "".join(told(**long | other))
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    assert "SIGTERM" not in "".join(told(**long))


def test_a_run_of_a_minute_says_nothing():
    assert not any(told(0.1, 100))
