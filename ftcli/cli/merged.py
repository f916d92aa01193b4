"""What came of a merge, laid out for people: what was written, what of the update is in it, and how it was measured."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ftcli.cli.outcome import format_bytes
from ftcli.errors import VerificationFailed

if TYPE_CHECKING:
    from ftcli.evaluate.verdict import Verdict
    from ftcli.merge.run import Merged

_OTHER = {"original": "dequantized", "dequantized": "original"}
_FAR = 0.005  # nats per token, from which another base is worth a second merge
_HEAD = f"  {'':<10}{'tokens':>8}  {'KL':>8}  {'bound':>6}  {'top-1':>7}  loss: adapter → merged"


def list_merge(merged: Merged) -> Iterator[str]:
    """Yields the lines, of at most 80 columns but for names and paths."""
    onto = "the dequantized 4-bit weights" if merged.onto == "dequantized" else "the original weights"
    yield f"{merged.output}: {merged.dtype}, onto {onto}"
    tensors = f"{merged.n_merged} of {merged.n_merged + merged.n_copied} tensors changed"
    yield f"  {'weights':<9} {format_bytes(merged.size_bytes)}, {tensors}"
    if (delta := merged.delta)["modules"]:
        yield f"  {'update':<9} {min(1, delta['kept']):.1%} of it survived the rounding to {merged.dtype};"
        yield f"  {'':<9} the least, {min(1, delta['least_kept']):.1%}, in {delta['least_module']}"
    if merged.verification is None:
        yield f"  {'verified':<9} no"
    elif not merged.verification.sets:
        error, name = merged.verification.worst_error, merged.verification.worst_tensor
        yield f"  {'verified':<9} tensor by tensor: the largest error is {error:.2f} of what rounding"
        yield f"  {'':<9} allows, in {name}"
    else:
        yield ""
        yield _HEAD
        yield from _list_verdicts(merged.verification.sets)
        if merged.verification.other:
            yield f"  and with --onto {_OTHER[merged.onto]}:"
            yield from _list_verdicts(merged.verification.other)
            yield from _advise(merged)
    if merged.verification is None or merged.verification.has_passed:
        yield from ("", "next:", f"  ftcli chat {shlex.quote(merged.output)}")


def _advise(merged: Merged) -> Iterator[str]:
    """Yields a line where the other base would have been far closer to what was trained."""
    found = merged.verification
    assert found is not None
    here, there = (max(verdict.distance for verdict in verdicts.values()) for verdicts in (found.sets, found.other))
    if here > _FAR and here > 2 * there:
        yield f"  that is closer to what was trained: --onto {_OTHER[merged.onto]} --overwrite"


def _list_verdicts(verdicts: Mapping[str, Verdict]) -> Iterator[str]:
    for name, verdict in verdicts.items():
        found = verdict.comparison
        figures = f"{found.n_tokens:>8,}  {found.kl:>8.5f}  {verdict.most_kl:>6.3f}  {found.top1:>7.2%}"
        yield f"  {name.replace('_', ' '):<10}{figures}  {found.loss_source:.4f} → {found.loss_result:.4f}"


def explain_failure(merged: Merged) -> VerificationFailed | None:
    """The error of a merge that is not the model it was made from; None for one that is."""
    found = merged.verification
    if found is None or found.has_passed:
        return None
    hints = ["--dtype float32"] if merged.dtype != "float32" else []
    if merged.onto == "original" and found.other and all(verdict.has_passed for verdict in found.other.values()):
        hints = ["--onto dequantized"]  # it was measured, and would do
    hint = f"merge again with {hints[0]} and --overwrite" if hints else "look at the base and the adapter"
    why = f"{merged.output} is written, and its manifest says so"
    if not found.sets:
        what = f"the merge differs from base and adapter in {found.worst_tensor}"
    else:
        name, worst = max(found.sets.items(), key=lambda pair: pair[1].distance)
        kl = f"{worst.comparison.kl:.4f}"
        what = f"the merged model is not the one that was trained: KL {kl} on {name.replace('_', ' ')} rows"
        why = f"at most {worst.most_kl:.4f} nats per trained token are allowed; {why}"
    return VerificationFailed(what, where=merged.output, why=why, hint=hint)
