"""A tokenize report and its rows as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ftcli.jobs.preview import MARKS, DocumentView, RowView, TokenView, spell_tokens
from ftcli.jobs.report import PartReport, TokenizeReport
from ftcli.jobs.words import WordReport
from ftcli.store.page import frame_page, write_text

_STYLE = """
.bar { display: inline-block; height: .8em; background: var(--trained-ink); opacity: .7; vertical-align: -.05em; }
.finding { border-left: 4px solid var(--line); padding: .1rem 0 .1rem .8rem; margin: .7rem 0; overflow-wrap: anywhere; }
.finding.error { border-color: var(--cut-ink); } .finding.warning { border-color: #c98a00; }
.line { display: grid; grid-template-columns: 1.6rem minmax(0, 3fr) minmax(0, 2fr); gap: .6rem;
  border-top: 1px solid var(--line); padding: .15rem .8rem; font: 13px/1.7 ui-monospace, monospace; }
.line .mark { color: var(--soft); user-select: none; }
.tokens { overflow-wrap: anywhere; } .spelled { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft); }
.t { white-space: pre-wrap; border-right: 1px solid var(--soft); padding: .1em 0; }
.trained .t { background: var(--trained); color: var(--trained-ink); text-decoration: underline; }
.truncated .t { color: var(--cut-ink); text-decoration: line-through; }
.s { color: var(--special); font-weight: 700; border: 1px solid var(--special); border-radius: 3px; margin: 0 1px; }
.trained .s { color: var(--special); }
.legend .line { border: 0; padding: 0; display: inline; } .legend > span { margin-right: 1.4rem; }
@media (max-width: 640px) { .line { grid-template-columns: 1.2rem minmax(0, 1fr); }
  .spelled { grid-column: 2; border-left: 2px solid var(--line); padding-left: .5rem; } }
"""


def build_page(report: TokenizeReport, rows: Sequence[RowView], words: WordReport | None) -> str:
    """The whole page."""
    title = f"{report.target} · {report.model}"
    lines = [
        f"<h1>{write_text(report.target)}</h1>",
        f'<p class="soft">tokens of {write_text(report.model)} ({report.vocabulary:,} entries), template: '
        f"{write_text(report.template.name)}; a turn ends with "
        f"<code>{write_text(', '.join(report.template.end_of_turn) or 'nothing')}</code></p>",
        *_write_findings(report),
        *(line for part in report.parts for line in _write_part(part)),
        *_write_costs(report),
        *_write_templates(report),
        *(_write_words(words) if words else ()),
        "<h2>Rows</h2>",
        *_write_legend(),
        *(line for number, row in enumerate(rows) for line in _write_row(row, is_open=number < 3)),
    ]
    return frame_page(title, lines, style=_STYLE)


def _write_findings(report: TokenizeReport) -> Iterator[str]:
    yield "<h2>Checks</h2>"
    if not report.findings:
        yield "<p>nothing found</p>"
    for finding in report.findings:
        places = ", ".join(finding.places) + (", …" if finding.n_rows > len(finding.places) else "")
        yield f'<div class="finding {finding.severity}"><p><b>{finding.severity}</b> {write_text(finding.what)}</p>'
        for text in (f"at {places}" if places else "", finding.why, f"→ {finding.hint}" if finding.hint else ""):
            yield f'<p class="soft">{write_text(text)}</p>' if text else ""
        yield "</div>"
    if report.skipped:
        yield f"<p>{len(report.skipped):,} bad rows are left out, the first: {write_text(str(report.skipped[0]))}</p>"


def _write_part(part: PartReport) -> Iterator[str]:
    share = part.n_target_tokens / max(1, part.n_tokens)
    yield f"<h2>{write_text(part.name)}</h2>"
    yield (
        f"<p>{part.n_rows:,} rows, {part.n_turns:,} turns, {part.n_documents:,} documents; {part.n_tokens:,} tokens, "
        f"{part.n_target_tokens:,} trained ({share:.1%}), of which {part.n_stop_tokens:,} end a turn"
        + (f"; the texts alone have {part.tokens_per_word:.2f} tokens for each word" if part.tokens_per_word else "")
        + "</p>"
    )
    files = ", ".join(f"{file['name']} ({file['n_rows']:,} {file['format']})" for file in part.files)
    yield f'<p class="soft">{write_text(files)}</p>'
    most = max(entry.n_documents for entry in part.histogram)
    yield '<div class="scroll"><table><tr><th>tokens</th><th>documents</th><th class="text"></th></tr>'
    for entry in part.histogram:
        width = round(120 * entry.n_documents / most, 1)
        yield (
            f"<tr><td>{entry.first:,} – {entry.last:,}</td><td>{entry.n_documents:,}</td>"
            f'<td class="text"><span class="bar" style="width:{width}px"></span></td></tr>'
        )
    ranks = ", ".join(f"{name} {value:,}" for name, value in part.percentiles.items())
    yield f'</table></div><p class="soft">min {part.shortest:,}, {ranks}, max {part.longest:,}</p>'


def _write_costs(report: TokenizeReport) -> Iterator[str]:
    yield "<h2>What max_length costs</h2>"
    yield '<div class="scroll"><table><tr><th>max_length</th><th>rows cut</th><th>trained tokens lost</th>'
    yield '<th>stop tokens lost</th><th>packs</th><th>fill</th><th class="text"></th></tr>'
    for cost in report.costs:
        mark = "recipe " if cost.is_recipe else ""
        mark += cost.recommendation
        yield (
            f"<tr><td>{cost.max_length:,}</td><td>{cost.rows_lost:,}</td><td>{cost.target_tokens_lost:,}</td>"
            f"<td>{cost.stop_tokens_lost:,}</td><td>{cost.n_packs:,}</td><td>{cost.fill:.1%}</td>"
            f'<td class="text">{mark}</td></tr>'
        )
    yield "</table></div>"
    flops = "" if report.training.flops is None else f", {report.training.flops:.2e} FLOPs"
    epochs = f"{report.training.epochs:g} epoch{'s' if report.training.epochs != 1 else ''}"
    yield f"<p>Training: {report.training.n_tokens:,} tokens in {epochs}{flops}</p>"


def _write_templates(report: TokenizeReport) -> Iterator[str]:
    if report.template.own_text is None:
        return
    yield "<h2>The model's own template, and this one</h2>"
    yield '<div class="line"><span></span>'
    yield f"<b>the model's own</b><b>{write_text(report.template.name)}</b></div>"
    yield '<div class="line"><span></span>'
    yield f'<span class="spelled">{write_text(report.template.own_text)}</span>'
    yield f'<span class="spelled">{write_text(report.template.text)}</span></div>'


def _write_words(words: WordReport) -> Iterator[str]:
    yield "<h2>Words that split badly</h2>"
    yield (
        f"<p>as tokens of their own they would save {words.tokens_saved:,} of {words.n_tokens:,} tokens</p>"
        '<div class="scroll"><table><tr><th>word</th><th>times</th><th>tokens saved</th>'
        '<th class="text">pieces</th></tr>'
    )
    for word in words.words:
        yield (
            f"<tr><td>{write_text(word.word)}</td><td>{word.count:,}</td><td>{word.tokens_saved:,}</td>"
            f'<td class="text"><code>{write_text("|".join(word.pieces))}</code></td></tr>'
        )
    yield "</table></div>"


def _write_legend() -> Iterator[str]:
    yield '<p class="legend">'
    for state, mark in MARKS.items():
        name = "cut off" if state == "truncated" else state
        yield f'<span>{mark} <span class="line {state}"><span class="t">{name}</span></span></span>'
    yield '<span><span class="s">special token</span></span></p>'


def _write_row(row: RowView, *, is_open: bool) -> Iterator[str]:
    why = f" · {row.why}" if row.why else ""
    yield f"<details{' open' if is_open else ''}><summary><b>{write_text(row.place)}</b> "
    yield f'<span class="soft">{row.n_tokens:,} tokens, {row.n_trained:,} trained{write_text(why)}</span></summary>'
    for number, document in enumerate(row.documents, 1):
        if len(row.documents) > 1:
            yield f'<div class="line"><span></span><b>document {number} of {len(row.documents)}</b></div>'
        yield from _write_document(document)
    yield "</details>"


def _write_document(document: DocumentView) -> Iterator[str]:
    for line in document.list_lines():
        state = line[0].state
        tokens = "<wbr>".join(_write_token(token) for token in line)
        yield f'<div class="line {state}"><span class="mark">{MARKS[state]}</span><span class="tokens">{tokens}</span>'
        yield f'<span class="spelled">{write_text(spell_tokens(line).rstrip(chr(10)))}</span></div>'


def _write_token(token: TokenView) -> str:
    kind = "t s" if token.piece.is_special else "t"
    return f'<span class="{kind}" title="{token.piece.id}">{write_text(token.piece.shown)}</span>'
