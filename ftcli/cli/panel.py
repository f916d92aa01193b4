"""A run under way as a few lines of a terminal: how far it is, how the loss goes, what it takes, what came out last.

step  412/1000  ███████████████▍                       41%  2:14 left
loss  1.2345  ▇▆▅▅▄▃▃▂▂▂▁▁  norm 0.52  lr 1.8e-04
      1,234 tok/s  memory 10.2 GB of 12.1 GB forecast
eval  held 1.3321, score 45.0% (step 400)
said  What is LoRA? → Low-rank adaptation …
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ftcli.cli.outcome import format_bytes, format_seconds
from ftcli.events import EvalDone, Sampled, StepDone

_BLOCKS = " ▏▎▍▌▋▊▉█"
_LEVELS = "▁▂▃▄▅▆▇█"
_SPARK_COLUMNS = 24
_KEPT_LOSSES = 4096


@dataclass
class Panel:
    """What a run has reported so far, as far as the lines show it."""

    step: StepDone | None = None
    losses: list[float] = field(default_factory=list)
    evals: dict[str, EvalDone] = field(default_factory=dict)
    sample: Sampled | None = None

    def take(self, event: StepDone | EvalDone | Sampled) -> None:
        """Nothing; the lines show ``event``."""
        if isinstance(event, StepDone):
            self.step = event
            self.losses.append(event.loss)
            if len(self.losses) > _KEPT_LOSSES:  # neighbours become one: the curve is of the whole run
                self.losses = [sum(pair) / 2 for pair in zip(self.losses[::2], self.losses[1::2], strict=False)]
        elif isinstance(event, EvalDone):
            self.evals[event.dataset] = event
        else:
            self.sample = event

    def list_lines(self, width: int) -> Iterator[str]:
        """Yields the lines, none wider than ``width``."""
        if self.step is None:
            return
        for line in self._list_lines(self.step, width):
            yield line if len(line) <= width else f"{line[: width - 2]} …"

    def _list_lines(self, step: StepDone, width: int) -> Iterator[str]:
        share = step.step / step.total_steps
        left = f"{share:4.0%}  {format_seconds(step.seconds_left)} left"
        count = f"step  {step.step:>{len(str(step.total_steps))}}/{step.total_steps}  "
        yield f"{count}{draw_bar(share, max(4, min(40, width - len(count) - len(left) - 3)))} {left}"
        yield f"loss  {step.loss:.4f}  {draw_spark(self.losses)}  norm {step.grad_norm:.3g}  lr {step.lr:.2g}"
        memory = ""
        if step.memory_bytes:
            memory = f"  memory {format_bytes(step.memory_bytes)}"
            memory += f" of {format_bytes(step.forecast_bytes)} forecast" if step.forecast_bytes else ""
        yield f"      {step.tokens_per_second:,.0f} tok/s{memory}"
        for done in self.evals.values():
            score = "" if done.score is None else f", score {done.score:.1%}"
            yield f"eval  {done.dataset} {done.loss:.4f}{score} (step {done.step})"
        if self.sample:
            yield f"said  {' '.join(self.sample.prompt.split())} → {' '.join(self.sample.text.split()) or '(nothing)'}"


def draw_bar(share: float, columns: int) -> str:
    """A bar of so many columns, filled from the left, to an eighth of a column."""
    eighths = round(min(1.0, max(0.0, share)) * columns * 8)
    full, part = divmod(eighths, 8)
    return (_BLOCKS[8] * full + (_BLOCKS[part] if part else "")).ljust(columns)


def draw_spark(values: list[float], columns: int = _SPARK_COLUMNS) -> str:
    """A curve of ``values`` a line high, the mean of neighbours where there are more than columns."""
    finite = [value for value in values if value - value == 0]
    if not finite:
        return ""
    size = max(1, -(-len(finite) // columns))
    means = [sum(part) / len(part) for i in range(0, len(finite), size) if (part := finite[i : i + size])]
    low, high = min(means), max(means)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0
    return "".join(_LEVELS[round((mean - low) * scale)] for mean in means)
