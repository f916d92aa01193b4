"""What came of a quantisation, laid out for people: its size, what it lost of its source, who loads it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ftcli.cli.exported import explain_failure as explain_export
from ftcli.cli.exported import list_export
from ftcli.cli.outcome import format_bytes
from ftcli.cli.scoreboard import list_scoreboard
from ftcli.errors import VerificationFailed

if TYPE_CHECKING:
    from ftcli.jobs.compression import Compared
    from ftcli.quantize.verify import Verification
    from ftcli.quantize.work import Quantized


def list_quantized(made: Quantized) -> Iterator[str]:
    """Yields the lines, of at most 80 columns but for names and paths."""
    group = f" in groups of {made.group_size}" if made.group_size else ""
    yield f"{made.output}: {made.spec.title}{group}"
    size = f"{format_bytes(made.size_bytes)}, {made.bits_per_weight:.2f} bits per weight"
    yield f"  {'weights':<12} {size}"
    yield f"  {'packed':<12} {made.n_layers} layers, {made.share:.1%} of the parameters"
    if made.calibration:
        yield f"  {'calibration':<12} {made.calibration.describe()}"
    yield from _list_verification(made.verification)
    if made.is_usable:
        path = shlex.quote(made.output)
        yield from ("", "next:", f"  ftcli chat {path}")
        if made.spec.method.is_fitted:
            yield f"  vllm serve {path}"


def list_compared(made: Compared, width: int) -> Iterator[str]:
    """Yields the lines on several forms side by side, no more than ``width`` columns wide, and on the kept one."""
    from ftcli.quantize.work import Quantized

    yield from list_scoreboard(made.scoreboard, width)
    yield ""
    if made.made is None:
        yield "none is kept: --method NAME keeps one, --max-size 5GB the best that is no larger"
    elif isinstance(made.made, Quantized):
        yield from list_quantized(made.made)
    else:
        yield from list_export(made.made)


def explain_kept(made: Compared) -> VerificationFailed | None:
    """The error of a kept form that is not its source any more; None for a good one, or none."""
    from ftcli.quantize.work import Quantized

    if isinstance(made.made, Quantized):
        return explain_failure(made.made)
    return explain_export(made.made.files) if made.made else None


def _list_verification(found: Verification | None) -> Iterator[str]:
    from ftcli.quantize.card import list_worst

    if found is None or found.problem or found.verdict is None:
        text = "no" if found is None else found.problem or f"its files are sound; not compared: {found.skipped}"
        yield f"  {'verified':<12} {text}"
        return
    verdict, kl = found.verdict, found.verdict.comparison
    failed = "" if found.has_passed else "  failed"
    yield f"  {'lost':<12} KL {kl.kl:.4f} of {verdict.most_kl:.2f} nats allowed, top-1 {kl.top1:.1%}{failed}"
    yield f"  {'perplexity':<12} {kl.ppl_source:.4g} → {kl.ppl_result:.4g} on {kl.n_tokens:,} tokens"
    if found.worst:
        yield f"  {'worst blocks':<12} {list_worst(found, 2)}"


def explain_failure(made: Quantized) -> VerificationFailed | None:
    """The error of a result that is not its source any more; None for a good one."""
    found = made.verification
    if found is None or found.has_passed:
        return None
    kept = "the folder is written, and its manifest.json says so"
    if found.problem or found.verdict is None:
        return VerificationFailed("the folder is unfit for use", where=made.output, why=f"{found.problem}; {kept}")
    kl, allowed = found.verdict.comparison.kl, f"{found.verdict.most_kl:.3g}"
    if found.verdict.has_passed:
        block = found.broken[0]
        what = f"{block.name} does not do what it did: its error is {block.error:.0%} of what it adds"
        why = f"at most {found.most_error:.0%} are allowed for this method; {kept}"
        return VerificationFailed(what, where=made.output, why=why, hint="8 bits: --method int8, or gptq --bits 8")
    hints = [] if made.spec.bits == 8 else ["8 bits: --method int8, or gptq --bits 8"]
    if made.spec.method.is_fitted and made.spec.bits < 8:
        hints.insert(0, "more rows: --calibration FILE; learned rounding: --tune 200")
    if made.from_4bit:
        merge = f"ftcli merge {shlex.quote(made.source)} --onto dequantized"
        hints.append(f"{merge}, whose folder is quantised as the base was in training")
    return VerificationFailed(
        f"{made.spec.title} is not the model that was quantised: KL {kl:.4f} nats per trained token",
        where=made.output,
        why=f"at most {allowed} are allowed for this method on these rows; {kept}",
        hint="; or ".join(hints),
    )
