"""The lines of a run under way."""

from __future__ import annotations

import pytest

from ftcli.cli.panel import Panel, draw_bar, draw_spark
from ftcli.events import EvalDone, Sampled, StepDone


def make_step(step: int, total: int = 1000, loss: float = 1.5) -> StepDone:
    return StepDone(step, total, 0.5, loss, 0.52, 1.8e-4, 1234.5, 134.0, memory_bytes=10 << 30, forecast_bytes=12 << 30)


@pytest.mark.parametrize("width", [40, 60, 79, 119, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    panel = Panel()
    assert list(panel.list_lines(width)) == []
    for step in range(1, 500):
        panel.take(make_step(step, loss=5 / step))
    panel.take(EvalDone(400, "held_out", 1.3321, 0.45, 20))
    panel.take(Sampled(400, "What is\nLoRA? " * 20, "a low-rank update " * 20))
    lines = list(panel.list_lines(width))
    assert len(lines) == 5
    assert all(len(line) <= width for line in lines)
    if width > 60:
        text = "\n".join(lines)
        for words in ("499/1000", "50%", "2:14 left", "norm 0.52", "lr 0.00018", "1,234 tok/s", "10.74 GB of 12.88 GB"):
            assert words in text
        assert "held_out 1.3321, score 45.0% (step 400)" in text
        assert "\n" not in lines[-1]


def test_a_loss_that_is_no_number_breaks_no_line() -> None:
    panel = Panel()
    for loss in (2.0, float("nan"), float("inf"), 1.0):
        panel.take(make_step(1, loss=loss))
    assert any("█▁" in line for line in panel.list_lines(100))


def test_a_curve_is_of_the_whole_run() -> None:
    panel = Panel()
    for step in range(1, 20_001):
        panel.take(make_step(step, 20_000, loss=1 - step / 20_000))
    assert len(panel.losses) <= 4096
    spark = draw_spark(panel.losses)
    assert len(spark) <= 24
    assert (spark[0], spark[-1]) == ("█", "▁")
    assert draw_spark([1.0]) == "▁"
    assert draw_spark([]) == ""


def test_a_bar_fills_to_an_eighth() -> None:
    assert draw_bar(0, 4) == "    "
    assert draw_bar(1, 4) == "████"
    assert draw_bar(0.5, 4) == "██  "
    assert draw_bar(1 / 32, 4) == "▏   "
