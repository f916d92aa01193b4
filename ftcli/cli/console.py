"""The only file that prints: data to stdout, talk to stderr, legible without colour and at 80 columns."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ftcli.cli import exported, quantized
from ftcli.cli.event import describe_event, describe_progress
from ftcli.cli.merged import explain_failure, list_merge
from ftcli.cli.outcome import format_bytes, format_seconds, list_outcome
from ftcli.cli.panel import Panel
from ftcli.errors import FtcliError, PeerFailed, UsageError, VerificationFailed
from ftcli.events import EvalDone, Event, OnEvent, Progress, Sampled, StepDone

if TYPE_CHECKING:
    from ftcli.gguf.adapter import ExportedAdapter
    from ftcli.gguf.export import Exported
    from ftcli.jobs.compression import Compared
    from ftcli.jobs.environment import Environment
    from ftcli.jobs.safetensors import SafeExport
    from ftcli.merge.run import Merged
    from ftcli.quantize.work import Quantized
    from ftcli.recipe import LoadedRecipe
    from ftcli.train.summary import RunSummary

SCHEMA = 1
_PLAIN_LINES = 20  # about as many step lines as a log of a whole run should have
_LONGEST_LINE = 2000
_FRAME_SECONDS = 0.1
_CONTROL = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}  # not for a terminal


def print_text(text: str = "") -> None:
    """Nothing; ``text`` is a line on stdout."""
    print(text, flush=True)


def print_piece(text: str) -> None:
    """Nothing; ``text`` is on stdout as a part of a line, harmless to a terminal."""
    print(text.translate(_CONTROL) if sys.stdout.isatty() else text, end="", flush=True)


def print_label(text: str) -> None:
    """Nothing; ``text`` begins a line of stdout, bold where that has colours."""
    print(f"\x1b[1m{text}\x1b[0m" if text and has_colour() else text, end="", flush=True)


def print_talk(text: str) -> None:
    """Nothing; ``text`` is a line on stderr, if anybody reads that."""
    _print_error(text + "\n")


def print_marker(text: str) -> None:
    """Nothing; ``text`` is on stderr, and what is typed follows on its line."""
    _print_error(text)


def _print_error(text: str) -> None:
    with suppress(OSError):  # a log that was closed must not end the run
        print(text, end="", file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """Nothing; ``document`` is on stdout, as strict JSON: NaN and infinity are null, lone surrogates escaped."""
    try:
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(json.loads(json.dumps(document), parse_constant=lambda _: None), indent=2, ensure_ascii=False)
    print(text.encode("utf-8", "backslashreplace").decode("utf-8"), flush=True)


def is_main_process() -> bool:
    """Whether this process is the one that speaks for all of its run (torchrun and accelerate number them)."""
    return os.environ.get("RANK", "0") in ("", "0")


def show_error(error: FtcliError, *, as_json: bool) -> int:
    """The error's exit code, after it was shown; what another process of the run tells is not told again."""
    if as_json:
        details = {
            "code": error.code,
            "exit": error.exit_code,
            "message": f"{error.what}\n{error.why}" if error.why else error.what,
            "where": error.where or None,
            "hint": error.hint or None,
        }
        print_json({"schema": SCHEMA, **error.document, "error": details})
    if isinstance(error, PeerFailed):
        return error.exit_code
    label = "error:"
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        label = f"\x1b[1;31m{label}\x1b[0m"
    print_talk(f"{label} {make_printable(str(error))}")
    return error.exit_code


def make_printable(text: str) -> str:
    """``text`` without control characters, which data and names may hold, and no line of it endless."""
    lines = text.split("\n")
    shown = [line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} …" for line in lines]
    return "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in shown)


@contextmanager
def reporting(*, quiet: bool, verbose: bool) -> Iterator[OnEvent]:
    """A block in which libraries are silent and long work is reported on stderr through the yielded callable."""
    # read at torch's import: threads that spin while they wait cost a busy machine several times the CPU time
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if not verbose:
        _silence_libraries()
    reporter = Reporter(quiet=quiet or not is_main_process())
    try:
        yield reporter.report
    finally:
        reporter.end_line()


def _silence_libraries() -> None:
    """Progress bars and advice of the libraries would bury what ftcli says; errors still come as exceptions."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore")
    if loaded := sys.modules.get("transformers"):  # what it read from the environment is read
        loaded.utils.logging.disable_progress_bar()
    for name in ("transformers", "bitsandbytes", "peft", "accelerate", "torch", "llama.cpp"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Reporter:
    """Shows events: one live line in a terminal, some plain lines in a log."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.is_live = sys.stderr.isatty()
        self.has_line = False
        self.is_passing = False
        self.panel = Panel()
        self.n_panel_lines = 0
        self.drawn_at = 0.0

    def report(self, event: Event) -> None:
        if self.quiet:
            return
        if isinstance(event, StepDone | EvalDone | Sampled):
            self.panel.take(event)
        if isinstance(event, StepDone):
            self._show_step(event)
        elif isinstance(event, Progress):
            if self.is_live:
                self._clear_panel()
                self._show_live(f"{event.stage:<10} {describe_progress(event)}")
                self.is_passing = True
        else:
            self.end_line()
            self._clear_panel()
            print_talk(make_printable(describe_event(event, measure_width())))

    def end_line(self) -> None:
        """Nothing; the next output begins a line. A count that is over leaves no trace, a step does."""
        if self.has_line:
            _print_error("\r\x1b[K" if self.is_passing else "\n")
        self.has_line = self.is_passing = False

    def _clear_panel(self) -> None:
        if self.n_panel_lines:
            _print_error(f"\x1b[{self.n_panel_lines}A\x1b[J")
        self.n_panel_lines = 0

    def _show_step(self, event: StepDone) -> None:
        if self.is_live:
            self._draw_panel(is_last=event.step == event.total_steps)
            return
        width = len(str(event.total_steps))
        text = (
            f"step {event.step:>{width}}/{event.total_steps}  loss {event.loss:.4f}  "
            f"{event.tokens_per_second:,.0f} tok/s  {format_seconds(event.seconds_left)} left"
        )
        if event.step == 1 or event.step % max(1, event.total_steps // _PLAIN_LINES) == 0:
            print_talk(text)

    def _draw_panel(self, *, is_last: bool) -> None:
        """Nothing; the lines of the panel stand where they stood, unless they were drawn just now."""
        now = time.monotonic()
        if now - self.drawn_at < _FRAME_SECONDS and not is_last:
            return
        self.drawn_at = now
        self.end_line()
        lines = list(self.panel.list_lines(shutil.get_terminal_size().columns - 1))
        up = f"\x1b[{self.n_panel_lines}A" if self.n_panel_lines else ""
        _print_error(up + "".join(f"\r{make_printable(line)}\x1b[K\n" for line in lines) + "\x1b[J")
        self.n_panel_lines = len(lines)

    def _show_live(self, text: str) -> None:
        width = shutil.get_terminal_size().columns
        _print_error(f"\r{text[: width - 1]}\x1b[K")
        self.has_line, self.is_passing = True, False


def show_run(summary: RunSummary, *, as_json: bool) -> None:
    """Nothing; what came of a run is on stdout, with the commands that go on from it."""
    if as_json:
        print_json({"schema": SCHEMA, "command": "train", **summary.to_json()})
    else:
        show_lines(list_outcome(summary, width=measure_width()))


def show_merged(merged: Merged, *, as_json: bool) -> None:
    """Nothing; what came of a merge is on stdout.

    Raises:
        VerificationFailed: the result is not the model that it was made from.
    """
    _show_artifact("merge", merged.to_json(), list_merge(merged), explain_failure(merged), as_json=as_json)


def show_exported(made: Exported, *, as_json: bool) -> None:
    """Nothing; what came of an export is on stdout.

    Raises:
        VerificationFailed: a file is not the model that it was made from.
    """
    document, lines = exported.build_document(made), exported.list_export(made)
    _show_artifact("export", document, lines, exported.explain_failure(made.files), as_json=as_json)


def show_quantized(made: Quantized, *, as_json: bool) -> None:
    """Nothing; what came of a quantisation is on stdout.

    Raises:
        VerificationFailed: the result is not the model that it was made from.
    """
    document, lines = made.to_json(), quantized.list_quantized(made)
    _show_artifact("quantize", document, lines, quantized.explain_failure(made), as_json=as_json)


def show_compared(made: Compared, *, as_json: bool) -> None:
    """Nothing; several forms of one model are on stdout, side by side.

    Raises:
        VerificationFailed: the one that was kept is not the model that it was made from.
    """
    lines = quantized.list_compared(made, measure_width())
    _show_artifact("quantize", made.to_json(), lines, quantized.explain_kept(made), as_json=as_json)


def show_adapter(made: ExportedAdapter, *, as_json: bool) -> None:
    """Nothing; what came of a LoRA as GGUF is on stdout; raises as `show_exported`."""
    document, lines = exported.build_adapter_document(made), exported.list_adapter(made)
    _show_artifact("export", document, lines, exported.explain_failure([made]), as_json=as_json)


def show_safe(made: SafeExport, *, as_json: bool) -> None:
    """Nothing; what came of safetensors is on stdout."""
    _show_artifact("export", made.to_json(), exported.list_safe(made), None, as_json=as_json)


def _show_artifact(
    command: str,
    document: dict[str, Any],
    lines: Iterable[str],
    error: VerificationFailed | None,
    *,
    as_json: bool,
) -> None:
    """Nothing; an artifact is told of, and its failure is raised, with the document where that is all of stdout."""
    if as_json and error:
        error.document = {"command": command, **document}
    elif as_json:
        show_document(command, document)
    else:
        show_lines(map(make_printable, lines))
    if error:
        raise error


def show_lines(lines: Iterable[str]) -> None:
    """Nothing; the lines are on stdout."""
    for line in lines:
        print_text(line)


def show_document(command: str, document: Mapping[str, Any]) -> None:
    """Nothing; the one document of ``--json`` is on stdout."""
    print_json({"schema": SCHEMA, "command": command, **document})


def show_sequences(sequences: Iterable[dict[str, Any]]) -> None:
    """Nothing; each sequence is a line of JSON on stdout."""
    for sequence in sequences:
        print(json.dumps(sequence, ensure_ascii=False))
    sys.stdout.flush()


def measure_width() -> int:
    """The columns of the terminal, or 80; never fewer than 60."""
    return max(60, shutil.get_terminal_size((80, 24)).columns)


def has_colour() -> bool:
    """Whether stdout is a terminal whose user has nothing against colours."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def show_recipe(loaded: LoadedRecipe, text: str, *, as_json: bool, quiet: bool) -> None:
    """Nothing; the checked recipe is on stdout."""
    if as_json:
        resolved = loaded.recipe.model_dump(mode="json", by_alias=True)
        print_json({"schema": SCHEMA, "command": "recipe check", "recipe": resolved, "sources": dict(loaded.sources)})
    elif not quiet:
        print_text(text.rstrip())
        print_talk(f"{loaded.path}: no problems found")


def ask(question: str, given: str | None) -> str:
    """What was ``given``, or what a person at the terminal answers.

    Raises:
        UsageError: nobody sits there.
    """
    if given is not None:
        return given
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"{question}? nobody can be asked here", hint="name it on the command line")
    print_marker(f"{question}? ")
    return input().strip()


def show_environment(environment: Environment, *, as_json: bool) -> None:
    """Nothing; the environment is on stdout."""
    if as_json:
        print_json({"schema": SCHEMA, "command": "env", **asdict(environment)})
        return
    print_text(f"python     {environment.python} on {environment.platform}, {environment.cpu_cores} cores")
    for device in environment.devices:
        capability = f", compute capability {device.capability}" if device.capability else ""
        print_text(f"device     {device.kind}: {device.name}, {format_bytes(device.memory_bytes)}{capability}")
    print_text()
    for name, number in environment.versions.items():
        print_text(f"{name:<16} {number or 'not installed'}")
    print_text()
    for ability in environment.abilities:
        print_text(f"{ability.name:<16} {'yes' if ability.works else 'no ':<3}  {ability.detail}")
        if ability.hint:
            print_text(f"{'':<21} {ability.hint}")
