"""``ftcli chat`` as it is met: in a real terminal, and through pipes."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SMOLLM2
from test_cli import ftcli  # noqa: F401

from ftcli.cli.dialogue import converse
from ftcli.cli.line import LineReader
from ftcli.errors import Interrupted
from ftcli.store.history import add_history, read_history

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


class Terminal:
    """A process in a pseudo terminal; ``seen`` is what it wrote since the last ``expect``."""

    def __init__(self, *words: str, **environment: str) -> None:
        self.master, inner = pty.openpty()
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ftcli", *words],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            preexec_fn=take_terminal,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": "1", **environment},
        )
        os.close(inner)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """What was written up to the end of ``pattern``."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            try:
                read = os.read(self.master, 4096) if ready else b""
            except OSError:  # the process is gone
                read = b""
            assert read, f"no {pattern!r} in {self.seen!r}"
            self.seen = re.sub(r"\r\n|\x1b\[[?0-9]*[a-zA-Z]\r?", tidy, self.seen + read.decode("utf-8", "replace"))
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def interrupt(self, pattern: str) -> None:
        """Nothing; Ctrl-C at the prompt had this effect. Python heeds it while it waits for a key, or with the next."""
        time.sleep(0.3)
        self.type(CTRL_C)
        try:
            self.expect(pattern, seconds=10)
        except AssertionError:
            self.type(CTRL_C)
            self.expect(pattern)

    def wait(self) -> int:
        return self.process.wait(timeout=30)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def tidy(found: re.Match[str]) -> str:
    """A line's end as one character, and nothing for what moves the cursor."""
    return "\n" if found.group() == "\r\n" else ""


def take_terminal() -> None:
    """In the child: standard input is the terminal whose Ctrl-C reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_conversation_in_a_terminal(tiny_model: Path, tmp_path: Path) -> None:
    history = tmp_path / "hf" / "ftcli" / "chat_history"
    add_history(history, "typed yesterday")
    words = ("chat", str(tiny_model), "--max-new-tokens", "400")
    with Terminal(*words, HF_HOME=str(tmp_path / "hf")) as terminal:
        terminal.expect("Ctrl-D ends.*\n> ")
        terminal.type("question 1\n")
        terminal.expect("question 1\n")
        terminal.expect("\n\n\n")  # it streams: this model says nothing else, 400 times
        terminal.type(CTRL_C)
        terminal.expect(r"\(stopped\)\n")
        terminal.expect("> ")
        terminal.type("/pa\t\n")  # Tab completes
        terminal.expect("temperature=0.0 .*max_new_tokens=400")
        terminal.expect("> ")
        terminal.type("/params max_new_tokens=3\n")
        terminal.expect("max_new_tokens=3\n")
        terminal.expect("> ")
        terminal.type("one \\\n")
        terminal.expect(r"\.\.\. ")
        terminal.type("two\n")
        terminal.expect("ended by max_new_tokens=3")
        terminal.expect("> ")
        terminal.type("\x1b[200~pasted\nlines\x1b[201~\n")
        terminal.expect("ended by max_new_tokens=3")
        terminal.expect("> ")
        terminal.type(UP * 6 + "\n")  # beyond this conversation
        terminal.expect("typed yesterday\n")
        terminal.expect("ended by max_new_tokens=3")
        terminal.expect("> ")
        terminal.type("half a line")
        terminal.expect("half a line")
        terminal.interrupt("> ")
        terminal.interrupt("Ctrl-C again, Ctrl-D or /exit ends")
        terminal.expect("> ")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
    assert read_history(history) == [
        "typed yesterday", "question 1", "/params ", "/params max_new_tokens=3", "one \ntwo", "pasted\nlines",
        "typed yesterday",
    ]  # fmt: skip
    assert history.stat().st_mode & 0o777 == 0o600


def test_sigterm_in_an_answer_ends_with_143(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "ftcli").write_text("in the way: no history can be kept")
    words = ("chat", str(tiny_model), "--max-new-tokens", "400")
    with Terminal(*words, HF_HOME=str(tmp_path)) as terminal:
        terminal.expect("> ")
        terminal.type("question 1\n")
        terminal.expect("question 1\n")
        terminal.expect("\n\n\n")
        terminal.process.send_signal(signal.SIGTERM)
        terminal.expect("error: stopped by SIGTERM")
        assert terminal.wait() == 143


class Presses:
    """A reader at which Ctrl-C is pressed, with what stood in the line each time."""

    readline = None

    def __init__(self, *typed: str, is_terminal: bool = True) -> None:
        self.lines, self.is_terminal, self.typed = list(typed), is_terminal, ""

    def read(self, marker: str) -> str | None:
        self.typed = self.lines.pop(0)
        os.kill(os.getpid(), signal.SIGINT)
        return "never"


def test_ctrl_c_ends_at_the_second_empty_line(capsys: pytest.CaptureFixture[str]) -> None:
    conversation: Any = SimpleNamespace(is_over=False, marker="> ")
    reader: Any = Presses("half a line", "", "another", "", "")
    assert converse(conversation, reader, quiet=True) == 0
    assert reader.lines == []
    assert capsys.readouterr().err.count("Ctrl-C again") == 2
    piped: Any = Presses("", is_terminal=False)
    with pytest.raises(Interrupted) as caught:
        converse(conversation, piped, quiet=True)
    assert caught.value.exit_code == 130


def test_without_readline_lines_are_read_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown: list[str] = []
    typed = iter(["one \\", "two", "three \\\\", "four \\"])
    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)

    def read_line(marker: str) -> str:
        assert marker == ""
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read_line)
    reader = LineReader([], tmp_path / "history", shown.append)
    assert [reader.read("> ") for _ in range(4)] == ["one \ntwo", "three \\\\", "four ", None]
    assert shown == ["> ", "... ", "> ", "> ", "... ", "> "]
    assert read_history(tmp_path / "history") == ["one \ntwo", "three \\\\", "four "]


@pytest.mark.real
def test_a_gguf_file_remembers_the_turns() -> None:
    from ftcli.evaluate.generate import Sampling
    from ftcli.evaluate.subject import open_subject
    from ftcli.jobs.chat import Conversation

    conversation = Conversation(open_subject(SMOLLM2), Sampling(max_new_tokens=16))
    (voice,) = conversation.voices
    assert voice.subject.backend.context == 8192
    for question in ("What is the capital of Japan?", "And of Italy?"):
        last = conversation.ask(voice, question)
    assert "Rome" in last
    conversation.obey("/reset")
    assert conversation.ask(voice, "And of Italy?") != last


def test_a_pipe_is_a_conversation(ftcli: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def pipe(text: str, *words: str) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return ftcli("chat", tiny_model, "--max-new-tokens", "3", *words)

    result = pipe("question 1\n\n/system Be brief\nquestion 2\n/params\n")
    assert result.code == 0
    assert "the system message is set" in result.err
    assert "max_new_tokens=3" in result.err
    assert ">" not in result.err.replace("<|", "")
    once = ftcli("chat", tiny_model, "--max-new-tokens", "3", "--prompt", "question 1")
    assert result.out.startswith(once.out)
    assert result.out == pipe("question 1\n/system Be brief\nquestion 2\n", "--quiet").out
    broken = pipe("/sytem\nquestion 1\n/params top_k=x\n")
    assert broken.code == 2
    assert broken.out == once.out
    assert [line for line in broken.err.splitlines() if line.startswith("error: ")] == [
        "error: unknown command /sytem (did you mean /system?; to send it as a message, write //sytem)",
        "error: top_k takes a whole number, not 'x'",
    ]
    ended = pipe("/exit\nquestion 1\n")
    assert (ended.code, ended.out) == (0, "")


def test_options_reach_the_answer(ftcli: Any, tiny_model: Path) -> None:  # noqa: F811
    """A penalty changes what a greedy answer repeats; min-p 1 leaves the most probable token alone."""

    def ask(*words: str) -> Any:
        result = ftcli("chat", tiny_model, "--prompt", "question", "--max-new-tokens", "24", "--json", *words)
        assert result.code == 0, result.err
        document = json.loads(result.out)
        assert list(document)[2:] == ["target", "prompt", "answer", "base_answer", "notices"]
        return document["answer"]

    greedy = ask()
    assert ask("--repetition-penalty", "5") != greedy
    assert ask("--temperature", "1", "--min-p", "1") == greedy
    assert ask("--temperature", "5", "--seed", "1") != greedy
    idle = ftcli("chat", tiny_model, "--prompt", "question", "--max-new-tokens", "2", "--top-p", "0.5")
    assert "top_p without effect" in idle.err
    refused = ftcli("chat", tiny_model, "--prompt", "x", "--temperature", "1e-9")
    assert (refused.code, refused.out) == (2, "")
    assert "neither 0 nor" in refused.err
