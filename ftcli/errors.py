"""What can go wrong, in the words that the user meets: what happened, where, why, and how to mend it.

    FtcliError
    ├── UsageError          2   command line, existing output, missing extra
    │   └── RecipeError     2   all problems of one recipe at once
    ├── ContentError        3   data or model content: damaged, foreign, wrong base, template
    ├── HubError            4   hub, authentication, network
    ├── NumericError        5   NaN or infinity in loss or gradient
    ├── DiskError           6   disk full, permission, a folder held by another run
    ├── MemoryExhausted     7   host or device memory
    ├── VerificationFailed  8   an artifact that is not the model it came from
    ├── Interrupted   130/143   a signal, after a checkpoint
    └── PeerFailed              another process of the run failed, and tells it: with that one's code

Anything else that escapes is a bug in ftcli: exit code 1, with its traceback.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Sequence
from dataclasses import dataclass

_MEMORY_WORDS = (  # of errors that have no type of their own for it
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "CUDA out of memory",
    "failed to map segment",
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it is, what it is, and the edit or command that mends it."""

    what: str
    where: str = ""
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}"


class FtcliError(Exception):
    """An error that the user can act on; lower case, no full stop, legible without colour."""

    exit_code = 1
    code = "internal"

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.hint = hint
        self.document: dict[str, object] = {}  # what was made nevertheless, for --json

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.why:
            lines.append(f"  {self.why}")
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class UsageError(FtcliError):
    """The command line, an output that exists, or a package that is not installed."""

    exit_code = 2
    code = "usage"


class RecipeError(UsageError):
    """Everything that is wrong with one recipe, collected before anything is raised."""

    code = "recipe"

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(
            "\n".join(str(p) for p in self.problems),
            where="",
            hint="; ".join(dict.fromkeys(p.hint for p in self.problems if p.hint)),
        )


class ContentError(FtcliError):
    """Data or model content that cannot be used: damaged, foreign, or not what the recipe says."""

    exit_code = 3
    code = "content"


class HubError(FtcliError):
    """The model hub could not be reached, or refused."""

    exit_code = 4
    code = "hub"


class NumericError(FtcliError):
    """NaN or infinity where a number belongs; ``result`` is the step in which it came up."""

    exit_code = 5
    code = "numeric"
    result: object = None


class DiskError(FtcliError):
    """The disk is full, a path may not be written, or another run holds the folder."""

    exit_code = 6
    code = "disk"


class MemoryExhausted(FtcliError):
    """Host or device memory ran out."""

    exit_code = 7
    code = "memory"


class VerificationFailed(FtcliError):
    """An artifact was written but is not the model it was made from."""

    exit_code = 8
    code = "verification"


class Stopped(KeyboardInterrupt):
    """A signal that ends the work at once, wherever it is; raised by the handler of ``signal_number``."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class Interrupted(FtcliError):
    """A signal stopped the work, a run after it was saved; ``exit_code`` is 128 + the signal's number."""

    code = "interrupted"

    def __init__(self, what: str, *, signal_number: int, hint: str = "") -> None:
        super().__init__(what, hint=hint)
        self.exit_code = 128 + signal_number


class PeerFailed(FtcliError):
    """Another process of the same run failed, which shows the error; ``exit_code`` is that one's."""

    code = "peer"

    def __init__(self, what: str, *, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


def explain_stop(error: KeyboardInterrupt) -> Interrupted:
    """The stop that a signal made, in words; without a number it was SIGINT."""
    number = error.signal_number if isinstance(error, Stopped) else int(signal.SIGINT)
    return Interrupted(f"stopped by {signal.Signals(number).name}", signal_number=number)


def explain(error: BaseException) -> str:
    """What went wrong and why, in a line."""
    return f"{error.what}: {error.why}" if isinstance(error, FtcliError) and error.why else str(error)


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, told in ftcli's words or in a library's."""
    return isinstance(error, MemoryExhausted) or is_memory_error(error)


def is_memory_error(error: BaseException) -> bool:
    """Whether host or device memory ran out, in the many ways that torch, safetensors and C++ have to say so."""
    if isinstance(error, FtcliError):
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return any(words in str(error) for words in _MEMORY_WORDS)
