"""What came of an export, laid out for people: the files, their sizes, and what each lost of its source."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ftcli.cli.outcome import format_bytes
from ftcli.errors import VerificationFailed

if TYPE_CHECKING:
    from ftcli.gguf.adapter import ExportedAdapter
    from ftcli.gguf.export import Exported, ExportedFile
    from ftcli.gguf.verify import Verification
    from ftcli.jobs.safetensors import SafeExport

_HEAD = f"  {'type':<7}{'size':>9} {'bits':>6}  {'KL':>8} {'bound':>6} {'top-1':>7}  perplexity"


def build_document(exported: Exported) -> dict[str, Any]:
    """The document of ``--json``."""
    document = _build_document(exported.source, exported.files)
    return {**document, "modelfile": str(exported.modelfile) if exported.modelfile else None}


def build_adapter_document(made: ExportedAdapter) -> dict[str, Any]:
    """The document of ``--json`` of a LoRA as GGUF."""
    return _build_document(made.source, [made])


def _build_document(source: str, files: Sequence[ExportedFile | ExportedAdapter]) -> dict[str, Any]:
    """What is alike in both; ``verify`` is that of the worst file."""
    worst = find_worst(files)
    return {
        "source": source,
        "output": str(files[0].path.parent),
        "bytes": sum(file.size_bytes for file in files),
        "files": [file.to_json() for file in files],
        "verify": worst.verification.to_json() if worst and worst.verification else None,
    }


def list_export(exported: Exported) -> Iterator[str]:
    """Yields the lines, of at most 80 columns but for names and paths."""
    from ftcli.gguf.card import list_types
    from ftcli.gguf.modelfile import name_model

    files = exported.files
    yield f"{exported.source}: {len(files)} GGUF {'file' if len(files) == 1 else 'files'}"
    yield _HEAD
    for file in files:
        size = f"{format_bytes(file.size_bytes):>9} {file.bits_per_weight:>6.2f}"
        yield f"  {file.kind:<7}{size}  {_describe(file.verification)}"
    if n_texts := max((file.verification.n_texts for file in files if file.verification), default=0):
        n_misread = max(file.verification.n_misread for file in files if file.verification)
        told = "all" if not n_misread else f"all but {n_misread}"
        yield f"  vocabulary: {n_texts} texts were read, {told} with the tokenizer's own ids"
    yield ""
    for file in files:
        yield f"  {file.path}"
        yield f"    {list_types(file.types)}"
    good = [shlex.quote(str(file.path)) for file in files if file.is_usable]
    if good:
        yield from ("", "next:", f"  ftcli chat {good[0]}", f"  llama-cli -m {good[0]} -cnv")
    if exported.modelfile:
        yield f"  ollama create {name_model(exported.name)} -f {shlex.quote(str(exported.modelfile))}"


def list_adapter(made: ExportedAdapter) -> Iterator[str]:
    """Yields the lines on the LoRA of a run as GGUF."""
    ranks = f"rank {', '.join(map(str, made.ranks))}"
    yield f"{made.source}: the LoRA of {made.n_modules} matrices, {ranks}, for {made.base}"
    yield _HEAD
    yield f"  {made.kind:<7}{format_bytes(made.size_bytes):>9} {32:>6.2f}  {_describe(made.verification)}"
    yield from ("", f"  {made.path}")
    if made.verification is None or made.verification.has_passed:
        path = shlex.quote(str(made.path))
        yield from ("", "next, with a GGUF file of the base:", f"  llama-cli -m BASE.gguf --lora {path} -cnv")


def list_safe(made: SafeExport) -> Iterator[str]:
    """Yields the lines on weights that are safetensors now."""
    yield f"{made.output}: {made.n_tensors} tensors as safetensors"
    yield f"  {'weights':<9} {format_bytes(made.size_bytes)} in {', '.join(made.files[:3])}"
    if len(made.files) > 3:
        yield f"  {'':<9} and {len(made.files) - 3} more"
    for name, other in made.tied.items():
        yield f"  {'tied':<9} {name} is {other}, which stands once"
    if made.left_out:
        yield f"  {'left out':<9} {', '.join(made.left_out[:3])}"
    yield f"  {'verified':<9} {'every byte is that of the source' if made.verification else 'no'}"


def _describe(found: Verification | None) -> str:
    if found is None:
        return "not verified"
    if found.problem:
        return "unfit: see below"
    if found.verdict is None:
        return "not compared, its structure is sound"
    kl, verdict = found.verdict.comparison, found.verdict
    figures = f"{kl.kl:>8.5f} {verdict.most_kl:>6.3f} {kl.top1:>7.2%}  {kl.ppl_source:.4g} → {kl.ppl_result:.4g}"
    return figures if verdict.has_passed else f"{figures} failed"


def find_worst(files: Sequence[ExportedFile | ExportedAdapter]) -> ExportedFile | ExportedAdapter | None:
    """The file that is the furthest from its source; one that is unfit before all others."""
    return max((file for file in files if file.verification), key=_rate, default=None)


def explain_failure(files: Sequence[ExportedFile | ExportedAdapter]) -> VerificationFailed | None:
    """The error of an export of which a file is not its source any more; None for a good one."""
    failed = [file for file in files if file.verification and not file.verification.has_passed]
    worst = find_worst(failed)
    if worst is None or worst.verification is None:
        return None
    kept = "the file is written, and manifest.json says so"
    if worst.verification.problem or worst.verification.verdict is None:
        why = f"{worst.verification.problem}; {kept}"
        return VerificationFailed("the file is unfit for use", where=str(worst.path), why=why, hint="try another type")
    verdict = worst.verification.verdict
    return VerificationFailed(
        f"{worst.kind} is not the model that was exported: KL {verdict.comparison.kl:.4f} nats per trained token",
        where=str(worst.path),
        why=f"at most {verdict.most_kl:g} are allowed for this type; {kept}",
        hint=_suggest(worst),
    )


def _suggest(file: ExportedFile | ExportedAdapter) -> str:
    hints = []
    if file.from_4bit:
        merge = f"ftcli merge {shlex.quote(file.source)} --onto dequantized"
        hints.append(f"{merge}, whose folder is exported as the base was in training, in 4 bits")
    if file.larger:
        hints.append(f"a larger type: --gguf {file.larger}")
    return "; or ".join(hints) or "look at the model: ftcli inspect"


def _rate(file: ExportedFile | ExportedAdapter) -> tuple[bool, bool, float]:
    """How bad it is, where a KL that is no number is the worst."""
    found = file.verification
    if found is None or found.verdict is None:
        return found is not None and bool(found.problem), False, 0.0
    return False, not found.has_passed, found.verdict.distance
