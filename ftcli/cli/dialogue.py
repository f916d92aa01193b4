"""The turns of ``ftcli chat``: questions from a terminal, a pipe or ``--prompt``; answers on stdout as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftcli.cli import console
from ftcli.cli.event import describe_event
from ftcli.cli.line import LineReader
from ftcli.errors import FtcliError, Interrupted
from ftcli.events import Event
from ftcli.train.stop import StopRequest

if TYPE_CHECKING:
    from ftcli.jobs.chat import Conversation, Voice

_CTRL_C = 130  # the exit code of that signal


def ask_once(conversation: Conversation, prompt: str, *, as_json: bool, quiet: bool) -> None:
    """Nothing; the answer to ``prompt`` is on stdout, after the base's where both are asked."""
    if not as_json:
        for voice in conversation.voices:
            _AnswerView(voice.label, quiet=quiet).ask(conversation, voice, prompt)
        return
    told: list[str] = []
    answers = [
        conversation.ask(voice, prompt, on_event=lambda event: told.append(event.text)) for voice in conversation.voices
    ]
    document = {
        "target": conversation.subject.name,
        "prompt": prompt,
        "answer": answers[-1],
        "base_answer": answers[0] if conversation.compares else None,
        "notices": told,
    }
    console.show_document("chat", document)


def converse(conversation: Conversation, reader: LineReader, *, quiet: bool) -> int:
    """The exit code, when the person or the pipe has no more to say: that of a pipe's first error, else 0."""
    codes = []
    if reader.is_terminal and not quiet:
        console.print_talk("/help lists the commands, Ctrl-D ends the conversation")
    while not conversation.is_over and (line := _read_message(reader, conversation.marker)) is not None:
        try:
            told = conversation.obey(line)
        except FtcliError as error:
            codes.append(_show_trouble(error))
            continue
        if told:
            console.print_talk(told)
        elif told is None and line.strip():
            codes += [_answer(conversation, voice, line, reader, quiet=quiet) for voice in conversation.voices]
    return 0 if reader.is_terminal else next(filter(None, codes), 0)


def _read_message(reader: LineReader, marker: str) -> str | None:
    """The next line, None at the end. In a terminal Ctrl-C empties the line; at an empty one twice it is the end."""
    is_leaving = False
    shown = f"\001\x1b[1m\002{marker}\001\x1b[0m\002" if reader.readline and console.has_colour() else marker
    while True:
        try:
            with StopRequest():
                line = reader.read(shown)
        except Interrupted as stop:
            if not reader.is_terminal or stop.exit_code != _CTRL_C:
                raise
            console.print_talk("")
            if is_leaving and not reader.typed:
                return None
            is_leaving = not reader.typed
            if is_leaving:
                console.print_talk("Ctrl-C again, Ctrl-D or /exit ends the conversation")
            continue
        if line is None and reader.is_terminal:
            console.print_talk("")
        return line


def _answer(conversation: Conversation, voice: Voice, line: str, reader: LineReader, *, quiet: bool) -> int:
    """0, or the exit code of the error that came in place of the answer."""
    from ftcli.jobs.chat import read_message

    view = _AnswerView(voice.label, quiet=quiet)
    try:
        view.ask(conversation, voice, read_message(line))
    except Interrupted as stop:
        if not reader.is_terminal or stop.exit_code != _CTRL_C:
            raise
        console.print_talk(
            "(stopped)" if view.has_text else "(stopped before the answer began, the question is dropped)"
        )
    except FtcliError as error:
        return _show_trouble(error)
    if reader.is_terminal:
        console.print_talk("")
    return 0


class _AnswerView:
    """One answer on stdout as it comes, after its label; what is told about it stands on lines of its own."""

    def __init__(self, label: str, *, quiet: bool) -> None:
        self.label = f"{label + ':':<7}" if label else ""
        self.quiet = quiet
        self.has_text = self.is_open = False

    def ask(self, conversation: Conversation, voice: Voice, line: str) -> None:
        try:
            answer = conversation.ask(voice, line, on_text=self._show, on_event=self._tell)
            if not answer:
                self._show("")
        finally:
            self._end_line()

    def _show(self, piece: str) -> None:
        if not self.has_text:
            console.print_label(self.label)
        console.print_piece(piece)
        self.has_text = self.is_open = True

    def _tell(self, event: Event) -> None:
        self._end_line()
        if not self.quiet:
            console.print_talk(describe_event(event, console.measure_width()))

    def _end_line(self) -> None:
        if self.is_open:
            console.print_text()
        self.is_open = False


def _show_trouble(error: FtcliError) -> int:
    """The error's exit code, after one line told of it."""
    rest = "; ".join(part for part in (error.why, error.hint) if part)
    console.print_talk(console.make_printable(f"error: {error.what}" + (f" ({rest})" if rest else "")))
    return error.exit_code
