"""Something found wrong, or surprising, before training: what, where, what it means, what to do.

error     what would be learned is not what the rows say: `train` stops before the model is loaded
warning   something is lost or doubled
note      ftcli dealt with it, and says how
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ftcli.errors import ContentError

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing found; ``places`` are the first rows, of ``n_rows`` in all (0: not a matter of rows)."""

    severity: Severity
    code: str
    what: str
    why: str = ""
    hint: str = ""
    n_rows: int = 0
    places: tuple[str, ...] = ()


def check_findings(findings: Sequence[Finding]) -> None:
    """None if there is no error among ``findings``.

    Raises:
        ContentError: all errors at once.
    """
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        lines = [finding.what for finding in errors]
        hints = dict.fromkeys(finding.hint for finding in errors if finding.hint)
        where = errors[0].places[0] if errors[0].places else ""
        raise ContentError("\n".join(lines), where=where, why=errors[0].why, hint="; ".join(hints))
