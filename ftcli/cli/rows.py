"""A tokenize report and rows of tokens as lines of text, legible at 80 columns and without colour."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftcli.data.finding import Finding
    from ftcli.jobs.preview import DocumentView, RowView, TokenView
    from ftcli.jobs.report import LengthCost, PartReport, TokenizeReport
    from ftcli.jobs.text import TextReport
    from ftcli.jobs.tokenize import TokenizeResult
    from ftcli.jobs.words import WordReport

LEGEND = "# trained   . context   x cut off   «special token»   | between tokens"
_COLOURS = {"trained": "32", "context": "2", "truncated": "9;31"}
_SPECIAL = "1;35"
_BAR = 28


def list_tokenized(result: TokenizeResult, width: int, *, colour: bool) -> Iterator[str]:
    """The lines of everything that was asked for: the report, the words, the rows token by token."""
    yield from list_report(result.report, min(width, 100))
    if result.words is not None:
        yield ""
        yield from list_words(result.words, width)
    if result.rows:
        yield from ("", LEGEND)
    for row in result.rows:
        yield ""
        yield from list_row(row, width, colour=colour)


def list_report(report: TokenizeReport, width: int) -> Iterator[str]:
    """The lines of a whole report."""
    ends = ", ".join(report.template.end_of_turn) or "none"
    yield f"model      {report.model}"
    yield f"tokenizer  {report.vocabulary:,} entries"
    yield f"template   {report.template.name}; a turn ends with {ends}"
    for part in report.parts:
        yield ""
        yield from _list_part(part, width)
    yield ""
    yield from _list_costs(report)
    yield ""
    yield from _list_training(report)
    if report.template.own_text is not None:
        yield ""
        yield from _list_templates(report, width)
    for notice in report.notices:
        yield from wrap("notice: ", notice, width)
    if report.skipped:
        yield ""
        yield f"skipped    {len(report.skipped):,} bad rows"
        for problem in report.skipped[:5]:
            yield from wrap("  ", str(problem), width)
    yield ""
    yield from list_findings(report.findings, width)


def list_findings(findings: Sequence[Finding], width: int) -> Iterator[str]:
    """What was found, errors first: what, where, what it means, what to do."""
    if not findings:
        yield "checks     nothing found"
    for finding in findings:
        yield from wrap(f"{finding.severity + ':':<9}", finding.what, width)
        if finding.places:
            more = ", …" if finding.n_rows > len(finding.places) else ""
            yield from wrap(" " * 9 + "at ", _join_places(finding.places) + more, width)
        if finding.why:
            yield from wrap(" " * 9, finding.why, width)
        if finding.hint:
            yield from wrap(" " * 9 + "→ ", finding.hint, width)


def _list_part(part: PartReport, width: int) -> Iterator[str]:
    yield f"{part.name:<10} {part.n_rows:,} rows, {part.n_turns:,} turns, {part.n_documents:,} documents"
    shown = 0
    for file in part.files[:6]:
        name = _shorten(_shorten_path(file["name"]), width - 40)
        yield from wrap(" " * 11, f"{name}  {file['n_rows']:,} {file['format']}", width)
        shown += 1
    if shown < len(part.files):
        yield " " * 11 + f"and {len(part.files) - shown} more files"
    share = part.n_target_tokens / max(1, part.n_tokens)
    words = "" if part.tokens_per_word is None else f"; the texts alone have {part.tokens_per_word:.2f} for each word"
    yield f"tokens     {part.n_tokens:,}{words}"
    yield f"trained    {part.n_target_tokens:,} ({share:.1%}), of which {part.n_stop_tokens:,} end a turn"
    ranks = "  ".join(f"{name} {value:,}" for name, value in part.percentiles.items())
    yield from wrap("lengths    ", f"min {part.shortest:,}  {ranks}  max {part.longest:,}", width)
    most = max(entry.n_documents for entry in part.histogram)
    for entry in part.histogram:
        bar = "█" * max(1 if entry.n_documents else 0, round(_BAR * entry.n_documents / most))
        yield f"           {entry.first:>7,} – {entry.last:<7,} {bar:<{_BAR}} {entry.n_documents:>9,}"


def _list_costs(report: TokenizeReport) -> Iterator[str]:
    yield "max_length  rows cut  trained lost  stops lost   packs    fill"
    yield from map(_format_cost, report.costs)


def _format_cost(cost: LengthCost) -> str:
    marks = ["recipe"] if cost.is_recipe else []
    if cost.recommendation:
        marks.append(cost.recommendation)
    line = (
        f"{cost.max_length:>10,} {cost.rows_lost:>9,} {cost.target_tokens_lost:>13,} {cost.stop_tokens_lost:>11,} "
        f"{cost.n_packs:>7,} {cost.fill:>7.1%}  {' '.join(marks)}"
    )
    return line.rstrip()


def _list_training(report: TokenizeReport) -> Iterator[str]:
    cost = report.training
    text = f"training   {cost.n_tokens:,} tokens in {cost.epochs:g} epoch{'s' if cost.epochs != 1 else ''}"
    if cost.flops is not None:
        text += f", {cost.flops:.2e} FLOPs"
    yield text
    if cost.flops is None:
        yield f"           FLOPs unknown: {cost.why}"
    if cost.seconds is not None:
        yield f"           {_format_time(cost.seconds)} at the given tokens per second"


def _list_templates(report: TokenizeReport, width: int) -> Iterator[str]:
    """A small chat in the model's own template and in the recipe's, side by side."""
    half = (width - 3) // 2
    left = ["the model's own", *_fold(report.template.own_text or "", half)]
    right = [report.template.name, *_fold(report.template.text, half)]
    for i in range(max(len(left), len(right))):
        first = left[i] if i < len(left) else ""
        second = right[i] if i < len(right) else ""
        yield f"{_pad(first, half)} │ {second}".rstrip()


def list_row(row: RowView, width: int, *, colour: bool) -> Iterator[str]:
    """One row: tokens with their marks on the left, the text that they spell on the right."""
    why = f"  ({row.why})" if row.why else ""
    yield f"{_shorten_path(row.place)}  {row.n_tokens:,} tokens, {row.n_trained:,} trained{why}"
    for number, document in enumerate(row.documents, 1):
        if len(row.documents) > 1:
            yield f"  document {number} of {len(row.documents)}"
        yield from _list_document(document, width, colour=colour)


def _list_document(document: DocumentView, width: int, *, colour: bool) -> Iterator[str]:
    from ftcli.jobs.preview import MARKS, spell_tokens

    right = max(20, (width - 7) * 2 // 5)
    left = max(20, width - 7 - right)
    for line in document.list_lines():
        state = line[0].state
        text = spell_tokens(line)
        tokens = list(_wrap_tokens(line, left, colour=colour))
        texts = _fold(text.rstrip("\n"), right) or [""]
        for i in range(max(len(tokens), len(texts))):
            first, n_cells = tokens[i] if i < len(tokens) else ("", 0)
            second = texts[i] if i < len(texts) else ""
            yield f"  {MARKS[state]} {first}{' ' * (left - n_cells)} │ {second}".rstrip()


def _wrap_tokens(tokens: Sequence[TokenView], width: int, *, colour: bool) -> Iterator[tuple[str, int]]:
    """Lines of tokens with the cells that they take, each token whole unless it is longer than a line."""
    from rich.cells import cell_len

    line, used = "", 0
    for token in tokens:
        shown = f"«{token.piece.shown}»" if token.piece.is_special else f"{token.piece.shown}|"
        for part in _fold(shown, width) or [""]:
            size = cell_len(part)
            if used + size > width:
                yield line, used
                line, used = "", 0
            code = _SPECIAL if token.piece.is_special else _COLOURS[token.state]
            line += f"\x1b[{code}m{part}\x1b[0m" if colour else part
            used += size
    yield line, used


def list_words(report: WordReport, width: int) -> Iterator[str]:
    """Candidates for new tokens, one line each."""
    if not report.words:
        yield "words      none is split so badly that a token of its own would save anything"
        return
    yield f"{'saves':>8} {'times':>7}  word"
    for word in report.words:
        pieces = "|".join(word.pieces).strip()
        yield _shorten_end(f"{word.tokens_saved:>8,} {word.count:>7,}  {word.word}  =  {pieces}", width)
    share = report.tokens_saved / max(1, report.n_tokens)
    yield f"together they save {report.tokens_saved:,} of {report.n_tokens:,} tokens of text ({share:.1%})"


def list_text(report: TextReport, width: int) -> Iterator[str]:
    """The tokens of one text: position, id, piece, bytes."""
    yield f"{report.n_tokens:,} tokens, {report.n_characters:,} characters, {report.n_bytes:,} bytes"
    yield f"ids {list(report.ids)}" if len(report.ids) <= 12 else f"ids {list(report.ids[:12])} …"
    for number, piece in enumerate(report.pieces):
        shown = f"«{piece.shown}»" if piece.is_special else piece.shown
        line = f"{number:>6} {piece.id:>8}  {_pad(shown, 28)} {piece.data.hex(' ')}"
        yield _shorten_end(line, width)


def wrap(label: str, text: str, width: int) -> list[str]:
    lines = textwrap.wrap(
        text, width=width - 1, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False
    )
    return lines or [label.rstrip()]


def _fold(text: str, width: int) -> list[str]:
    """``text`` cut into pieces of at most ``width`` cells, at its newlines too; nothing is dropped."""
    from rich.cells import chop_cells

    return [piece for line in text.split("\n") for piece in (chop_cells(_show(line), width) or [""])] if text else []


def _show(text: str) -> str:
    return "".join(char if char.isprintable() else {"\t": "    "}.get(char, "·") for char in text)


def _pad(text: str, width: int) -> str:
    from rich.cells import cell_len

    return text + " " * max(0, width - cell_len(text))


def _join_places(places: Sequence[str]) -> str:
    """``a.jsonl:7, :9, b.jsonl:1``."""
    names = [place.rpartition(":") for place in places]
    shown = [
        f":{line}" if i and names[i - 1][0] == name else f"{_shorten_path(name)}:{line}"
        for i, (name, _, line) in enumerate(names)
    ]
    return ", ".join(shown)


def _shorten_path(place: str) -> str:
    """``place`` as seen from the working folder."""
    return _show(place.removeprefix(f"{os.getcwd()}/"))


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[1 - width :]


def _shorten_end(text: str, width: int) -> str:
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) < width else set_cell_size(text, width - 2).rstrip() + "…"


def _format_time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def tokenized_to_json(result: TokenizeResult) -> dict[str, Any]:
    """Everything that was asked for, as one document."""
    return {
        **report_to_json(result.report),
        "rows": [row_to_json(row) for row in result.rows],
        "words": report_to_json(result.words),
        "page": result.page,
    }


def report_to_json(report: Any) -> Any:
    """A report as JSON writes it: dataclasses as objects, bytes as hexadecimal."""
    from dataclasses import fields, is_dataclass

    if is_dataclass(report) and not isinstance(report, type):
        return {f.name: report_to_json(getattr(report, f.name)) for f in fields(report)}
    if isinstance(report, bytes):
        return report.hex()
    if isinstance(report, dict):
        return {key: report_to_json(value) for key, value in report.items()}
    if isinstance(report, list | tuple):
        return [report_to_json(item) for item in report]
    return report


def row_to_json(row: RowView) -> dict[str, Any]:
    """One row as JSON writes it: for each document its tokens as [id, piece, state, is special]."""
    documents = [
        [[t.piece.id, t.piece.shown, t.state, t.piece.is_special] for t in document.tokens]
        for document in row.documents
    ]
    return {
        "part": row.part,
        "place": row.place,
        "why": row.why,
        "n_tokens": row.n_tokens,
        "n_trained": row.n_trained,
        "n_unknown": row.n_unknown,
        "documents": documents,
    }
