"""SIGINT, SIGTERM and SIGHUP: asked for once, a run stops after the step it is in; a second SIGINT stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from ftcli.errors import Interrupted


class StopRequest:
    """A block in which signals are only noted, to be polled with ``check``."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
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

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number

    def check(self) -> None:
        """None, unless a signal came.

        Raises:
            Interrupted: with the signal's number.
        """
        if self.signal_number:
            name = signal.Signals(self.signal_number).name
            raise Interrupted(f"stopped by {name}", signal_number=self.signal_number)
