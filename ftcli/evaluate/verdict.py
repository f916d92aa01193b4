"""Whether a result is still the model it was made from: measured figures, and the bounds that they must keep.

A fine-tune that moved a model by D (KL of the tuned model to its base) is lost where the result is D away from the
tuned one. So the bound is a share of D, with a floor for what rounding alone does to a model, and a ceiling.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, isnan
from typing import Any

from ftcli.evaluate.compare import Comparison

MOST_KL = 0.05  # nats per trained token
MOST_SHARE = 0.25  # of the fine-tune's own distance from the base
ROUNDING_KL = 0.005  # two ways to compute one bfloat16 model are this far apart at most


def bound_kl(kl_base: float | None, *, floor: float = ROUNDING_KL, ceiling: float = MOST_KL) -> float:
    """The most nats per trained token that a result may be away from a source which is ``kl_base`` away from its base.

    None is a distance that is not known.
    """
    if kl_base is None or not isfinite(kl_base):
        return ceiling
    return min(ceiling, max(floor, MOST_SHARE * kl_base))


@dataclass(frozen=True)
class Verdict:
    """A result held against its source: KL per trained token in nats, and what it must not exceed.

    ``kl_base`` is the source's distance from the model without its fine-tuning, None where that was not measured;
    ``limit`` is a bound that holds instead of the one that follows from it.
    """

    comparison: Comparison
    kl_base: float | None = None
    limit: float | None = None

    @property
    def most_kl(self) -> float:
        """The bound on `Comparison.kl`."""
        return bound_kl(self.kl_base) if self.limit is None else self.limit

    @property
    def distance(self) -> float:
        """KL, infinite where that is no number."""
        return inf if isnan(self.comparison.kl) else self.comparison.kl

    @property
    def has_passed(self) -> bool:
        """Whether the result may be used for its source."""
        return self.comparison.is_finite and self.comparison.kl <= self.most_kl

    def to_json(self) -> dict[str, Any]:
        """The figures, by the names of ``--json``; what is not finite is null."""
        found = self.comparison
        figures = {
            "kl": found.kl,
            "most_kl": self.most_kl,
            "kl_base": self.kl_base,
            "top1": found.top1,
            "loss_source": found.loss_source,
            "loss_result": found.loss_result,
            "ppl_source": found.ppl_source,
            "ppl_result": found.ppl_result,
        }
        finite = {key: value if value is not None and isfinite(value) else None for key, value in figures.items()}
        return {**finite, "n_tokens": found.n_tokens, "passed": self.has_passed}
