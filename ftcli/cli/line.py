"""Lines from a person or a pipe: GNU readline where it is there, with history, Tab and whole pastes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from ftcli.store.history import KEPT_LINES, add_history, read_history


class LineReader:
    """Reads messages; ``is_terminal`` says whether a person types them, else they come from a pipe or file.

    A line that ends with one backslash goes on in the next. ``write_marker`` shows the prompt where stdout is no
    terminal and must stay clean.
    """

    def __init__(self, commands: Sequence[str], history: Path, write_marker: Callable[[str], None]) -> None:
        self.is_terminal = sys.stdin.isatty()
        self.history = history
        self.write_marker = write_marker
        self.readline = _open_readline(commands, history) if self.is_terminal and sys.stdout.isatty() else None
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="backslashreplace")  # bytes that are no text are seen, not fatal

    @property
    def typed(self) -> str:
        """What stood in the line when a signal ended its reading."""
        return str(self.readline.get_line_buffer()) if self.readline else ""

    def read(self, marker: str) -> str | None:
        """The next message, without the end of its line; None at the end of the input."""
        lines: list[str] = []
        while True:
            line = self._read_line(marker if not lines else "... ")
            if line is None:
                return self._remember("\n".join(lines)) if lines else None
            if not line.endswith("\\") or line.endswith("\\\\"):
                return self._remember("\n".join([*lines, line]))
            lines.append(line[:-1])

    def _read_line(self, marker: str) -> str | None:
        if self.is_terminal and not self.readline:
            self.write_marker(marker)
        try:
            return input(marker if self.readline else "")
        except EOFError:
            return None

    def _remember(self, text: str) -> str:
        if self.is_terminal and text.strip():
            add_history(self.history, text)
            if self.readline:
                self.readline.add_history(text)
        return text


def _open_readline(commands: Sequence[str], history: Path) -> Any:
    """Python's readline module, set up; None where Python was built without it."""
    try:
        import readline
    except ImportError:
        return None

    def complete(text: str, index: int) -> str | None:
        found = [f"{name} " for name in commands if name.startswith(text)] if readline.get_begidx() == 0 else []
        return found[index] if index < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.set_auto_history(False)  # a message of several lines is one entry
    readline.set_history_length(KEPT_LINES)
    if "libedit" in (readline.__doc__ or ""):
        readline.parse_and_bind("bind ^I rl_complete")
    else:
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message
    readline.clear_history()
    for text in read_history(history):
        readline.add_history(text)
    return readline
