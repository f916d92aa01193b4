"""Rows in numbers: their tokens and lengths, what each ``max_length`` would cost, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftcli.data.chat import ChatRenderer
from ftcli.data.check import count_stop_tokens, find_overflow, list_findings
from ftcli.data.documents import Documents
from ftcli.data.finding import Finding
from ftcli.data.loader import Part, build_set
from ftcli.data.packing import pack_lengths
from ftcli.data.template import ChatTemplate
from ftcli.data.tokenizer import load_tokenizer
from ftcli.errors import ContentError, FtcliError, Problem
from ftcli.jobs.rows import Tokenized

_PERCENTILES = (5, 25, 50, 75, 95, 99)
_SMALLEST, _MOST_CANDIDATES = 128, 7


@dataclass(frozen=True)
class Bin:
    """How many documents have ``first`` to ``last`` tokens."""

    first: int
    last: int
    n_documents: int


@dataclass(frozen=True)
class PartReport:
    """One side of a run in numbers, before anything is cut.

    ``tokens_per_word`` is of the rows' own texts, without what the template adds.
    """

    name: str
    files: tuple[dict[str, Any], ...]
    n_rows: int
    n_turns: int
    n_words: int
    n_documents: int
    n_tokens: int
    n_target_tokens: int
    n_stop_tokens: int
    tokens_per_word: float | None
    shortest: int
    longest: int
    percentiles: dict[str, int]
    histogram: tuple[Bin, ...]


@dataclass(frozen=True)
class LengthCost:
    """What one ``max_length`` would cost the training rows if longer ones were cut, and how full packs would be."""

    max_length: int
    rows_lost: int
    target_tokens_lost: int
    stop_tokens_lost: int
    fill: float
    n_packs: int
    is_recommended: bool = False
    is_recipe: bool = False

    @property
    def recommendation(self) -> str:
        """Why this length is recommended, in few words; empty if it is not."""
        if not self.is_recommended:
            return ""
        return "← context" if self.rows_lost else "← no loss"


@dataclass(frozen=True)
class TrainingCost:
    """What all epochs take; ``flops`` None where the model's config is not known, with the reason in ``why``."""

    epochs: float
    n_tokens: int
    flops: int | None
    seconds: float | None
    why: str = ""


@dataclass(frozen=True)
class TemplateReport:
    """Which template renders; ``own_text`` and ``text`` are a small chat in the model's own and in this one."""

    name: str
    end_of_turn: tuple[str, ...]
    text: str = ""
    own_text: str | None = None


@dataclass(frozen=True)
class TokenizeReport:
    """Everything that ``ftcli tokenize`` found."""

    target: str
    model: str
    vocabulary: int
    template: TemplateReport
    parts: tuple[PartReport, ...]
    costs: tuple[LengthCost, ...]
    training: TrainingCost
    findings: tuple[Finding, ...]
    skipped: tuple[Problem, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def has_errors(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)


def report_rows(tokenized: Tokenized, *, tokens_per_second: float | None = None) -> TokenizeReport:
    """What there is to say of the rows in numbers, and what is wrong with them."""
    recipe, renderer = tokenized.recipe, tokenized.renderer
    findings = _list_findings(tokenized)
    documents = tokenized.parts[0].select()
    stop_ids = () if any(f.code == "stop-token" for f in findings) else _find_stop_ids(renderer)
    return TokenizeReport(
        target=tokenized.target,
        model=recipe.model.name_or_path,
        vocabulary=len(renderer.tokenizer),
        template=_report_template(tokenized),
        parts=tuple(_report_part(part, stop_ids) for part in tokenized.parts),
        costs=_list_costs(tokenized, documents, stop_ids),
        training=_report_training(tokenized, documents, tokens_per_second),
        findings=tuple(findings),
        skipped=tuple(tokenized.reading.skipped or ()),
        notices=tuple(tokenized.reading.notices),
    )


def _find_stop_ids(renderer: ChatRenderer) -> Sequence[int]:
    if not renderer.template.source:
        eos = renderer.tokenizer.eos_token_id
        return () if eos is None else (eos,)
    return [*renderer.end_of_turn_ids, *([] if (eos := renderer.tokenizer.eos_token_id) is None else [eos])]


def _list_findings(tokenized: Tokenized) -> list[Finding]:
    findings = list_findings(tokenized.template_findings, tokenized.parts, tokenized.renderer, tokenized.limits)
    for part in tokenized.parts:
        try:
            findings += find_overflow(build_set(part, tokenized.data))
        except ContentError as error:
            findings.append(Finding("error", "rows", error.what, error.why, error.hint))
    order = ("error", "warning", "note")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _report_template(tokenized: Tokenized) -> TemplateReport:
    renderer, asked = tokenized.renderer, tokenized.recipe.tokenizer.chat_template
    if not renderer.template.source:
        return TemplateReport("none", ())
    try:
        ends = renderer.find_turn_ends()
    except ContentError:
        ends = ()
    text, own_text = renderer.template.render_sample(), None
    if asked != "auto":
        own = load_tokenizer(tokenized.files).chat_template
        if own and own != renderer.template.source:
            own_template = ChatTemplate(own, renderer.template.special_tokens, renderer.template.variables)
            own_text = own_template.render_sample()
    return TemplateReport("the model's own" if asked == "auto" else asked, ends, text, own_text)


def _report_part(part: Part, stop_ids: Sequence[int]) -> PartReport:
    table, documents = part.table, part.select()
    lengths = documents.end - documents.begin
    ranks = {f"p{share}": int(np.percentile(lengths, share, method="higher")) for share in _PERCENTILES}
    counts = np.bincount(table.file[part.rows], minlength=len(table.files))
    return PartReport(
        name=part.name,
        files=tuple(
            {"name": file.name, "format": file.format, "n_rows": int(n)}
            for file, n in zip(table.files, counts, strict=True)
        ),
        n_rows=int(part.rows.sum()),
        n_turns=int(table.n_turns[part.rows].sum()),
        n_words=int(table.n_words[part.rows].sum()),
        n_documents=len(documents),
        n_tokens=int(lengths.sum()),
        n_target_tokens=int(documents.count_targets().sum()),
        n_stop_tokens=count_stop_tokens(documents, stop_ids),
        tokens_per_word=_count_per_word(part),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        percentiles=ranks,
        histogram=_count_bins(lengths),
    )


def _count_per_word(part: Part) -> float | None:
    """Tokens of the rows' own texts for each word in them, by the sample that was measured."""
    table = part.table
    sampled = part.rows & (table.n_text_tokens >= 0)
    n_words = int(table.n_words[sampled].sum())
    return round(int(table.n_text_tokens[sampled].sum()) / n_words, 3) if n_words else None


def _count_bins(lengths: Any) -> tuple[Bin, ...]:
    """Bins that double in width, from the one of the shortest to the one of the longest."""
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(powers)
    first = int(powers.min())
    return tuple(
        Bin((1 << power >> 1) + 1 if power else 1, 1 << power, int(counts[power]))
        for power in range(first, len(counts))
    )


def _list_costs(tokenized: Tokenized, documents: Documents, stop_ids: Sequence[int]) -> tuple[LengthCost, ...]:
    lengths = documents.end - documents.begin
    longest = int(lengths.max())
    context = tokenized.limits.context or longest
    candidates: list[int] = []
    size = _SMALLEST
    while not candidates or candidates[-1] < min(longest, context):
        candidates.append(min(size, max(context, _SMALLEST)))
        size *= 2
    candidates = candidates[-_MOST_CANDIDATES:]
    own = tokenized.max_length
    wanted = sorted({*candidates, *([own] if own else [])})
    recommended = next((size for size in wanted if size >= longest), candidates[-1])
    return tuple(
        replace(_cost_length(documents, size, stop_ids), is_recommended=size == recommended, is_recipe=size == own)
        for size in wanted
    )


def _cost_length(documents: Documents, max_length: int, stop_ids: Sequence[int]) -> LengthCost:
    is_long = documents.end - documents.begin > max_length
    cut = Documents(
        documents.table,
        documents.begin,
        np.minimum(documents.end, documents.begin + max_length),
        documents.row,
        documents.weight,
    )
    whole, kept = documents.select(is_long), cut.select(is_long)
    lengths = cut.lengths
    packs = pack_lengths(lengths, max_length)
    return LengthCost(
        max_length=max_length,
        rows_lost=len(np.unique(documents.row[is_long])),
        target_tokens_lost=int(whole.count_targets().sum() - kept.count_targets().sum()),
        stop_tokens_lost=count_stop_tokens(whole, stop_ids) - count_stop_tokens(kept, stop_ids),
        fill=round(sum(lengths) / (len(packs) * max_length), 5),
        n_packs=len(packs),
    )


def _count_epochs(tokenized: Tokenized) -> float:
    """The epochs of the recipe, or those that its ``max_steps`` make."""
    recipe = tokenized.recipe
    if recipe.train.max_steps is None:
        return recipe.train.num_train_epochs
    from ftcli.train.loop import plan_run

    try:
        plan = plan_run(recipe, build_set(tokenized.parts[0], tokenized.data).documents)
    except ContentError:  # rows that cannot be trained on are among the findings
        return recipe.train.num_train_epochs
    epoch, index = plan.locate(plan.total_steps)
    return round(epoch + (index + 1) / plan.epoch_steps[epoch], 3)


def _report_training(tokenized: Tokenized, documents: Documents, tokens_per_second: float | None) -> TrainingCost:
    recipe = tokenized.recipe
    epochs = _count_epochs(tokenized)
    lengths = documents.end - documents.begin
    n_tokens = round(float((lengths * documents.weight).sum()) * epochs)
    seconds = n_tokens / tokens_per_second if tokens_per_second else None
    if not tokenized.files.gguf_path and not (tokenized.files.folder / "config.json").exists():
        return TrainingCost(epochs, n_tokens, None, seconds, "the folder holds a tokenizer alone")
    from ftcli.model.base import build_skeleton
    from ftcli.model.cost import TokenCounts, count_flops

    n_targets = float((documents.count_targets() * documents.weight).sum()) * epochs
    n_pairs = float((lengths.astype(float) ** 2 * documents.weight).sum()) * epochs / 2
    try:
        flops = count_flops(
            build_skeleton(tokenized.files, recipe.model),
            recipe,
            TokenCounts(n_tokens, round(n_targets), round(n_pairs)),
        )
    except FtcliError as error:
        return TrainingCost(epochs, n_tokens, None, seconds, error.what)
    return TrainingCost(epochs, n_tokens, flops, seconds)
