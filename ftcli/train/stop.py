"""SIGINT, SIGTERM and SIGHUP: while steps are made a signal is only noted, and polled; before that it stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from ftcli.errors import Stopped, explain_stop

received: list[int] = []  # the signals that were to end the work at once


def is_launched() -> bool:
    """Whether a launcher (torchrun, accelerate, ftcli) started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


@contextmanager
def deaf() -> Iterator[None]:
    """A block of a moment in which signals are lost: what is being told is told to its end."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_at_once() -> None:
    """Nothing; from now on SIGINT, SIGTERM and SIGHUP raise ``Stopped``, wherever they come, and are ``received``."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # else it is ignored
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    received.append(number)
    raise Stopped(number)


class StopRequest:
    """A block in which the first signal raises ``Stopped``, or after ``hold`` waits to be polled with ``check``.

    Until ``hold`` there is nothing that could be lost. A second SIGINT always stops at once.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self.is_held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if received:  # by a library that was being imported, and went on
            raise explain_stop(Stopped(received[0]))
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                # nohup ignores SIGHUP on purpose; a shell that ignores SIGINT for its background jobs does not
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt):
            raise explain_stop(error) from None
        if error is not None and self.signal_number and not self.is_held:  # a library's word for our Stopped
            raise explain_stop(Stopped(self.signal_number)) from None

    def hold(self) -> None:
        """Nothing; from now on the first signal waits for ``check``."""
        self.is_held = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        is_second = bool(self.signal_number) and number == signal.SIGINT
        self.signal_number = number
        if is_second or not self.is_held:
            raise Stopped(number)

    def check(self) -> None:
        """None, unless a signal came.

        Raises:
            Interrupted: with the signal's number.
        """
        if self.signal_number:
            raise explain_stop(Stopped(self.signal_number))
