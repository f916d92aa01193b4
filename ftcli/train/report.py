"""A run as one HTML page to look at: curves, held-out rows, answers over time, recipe and provenance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftcli.store.file import write_text as write_file
from ftcli.store.page import frame_page, write_text
from ftcli.store.run import RunFolder, read_lines, read_manifest
from ftcli.train.best import read_evals
from ftcli.train.plot import Curve, draw_curves
from ftcli.train.summary import RunSummary, SampleChange, summarize_run

_MOST_ROWS = 40
_STYLE = """
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: .8rem; }
.plots > div { border: 1px solid var(--line); border-radius: 6px; background: var(--panel); padding: .5rem; }
.plots svg { display: block; height: auto; }
.facts td:first-child { color: var(--soft); } .facts td { text-align: left; white-space: normal;
  overflow-wrap: anywhere; vertical-align: top; }
.answers td, .answers th { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; }
.answers { width: 100%; } .answers td { border-bottom: 1px solid var(--line); padding: .35rem .7rem .35rem 0; }
.wide { min-width: 34rem; }
.right { color: var(--trained-ink); } .wrong { color: var(--cut-ink); }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem;
  overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; }
details pre { border: 0; margin: 0; }
"""


def write_report(run: RunFolder) -> None:
    """Nothing; ``report.html`` shows the run as its folder has it now.

    Raises:
        DiskError: it cannot be written.
    """
    write_file(run.report, build_report(run))


def build_report(run: RunFolder) -> str:
    """The page; nothing in it is fetched from anywhere.

    Raises:
        ContentError: it is no run folder.
    """
    manifest, summary = read_manifest(run), summarize_run(run)
    name = run.path.resolve().name
    lines = [
        f"<h1>{write_text(name)}</h1>",
        f'<p class="soft">{write_text(describe_state(summary, manifest))}</p>',
        *_write_facts(list_facts(summary, manifest)),
        "<h2>Training</h2>",
        '<div class="plots">',
        *(f"<div>{picture}</div>" for picture in _draw_run(run, summary, manifest)),
        "</div>",
        *_write_evals(run, summary),
        *_write_prompts(run),
        *_write_changes(summary),
        *_write_sources(run, manifest),
    ]
    return frame_page(f"{name} · ftcli", lines, style=_STYLE)


def describe_state(summary: RunSummary, manifest: Mapping[str, Any]) -> str:
    """What the run is, in a line."""
    ended = f", {manifest['finished_at'][:16].replace('T', ' ')} UTC" if manifest.get("finished_at") else ""
    return f"{summary.state}{ended} · {summary.base} · ftcli {manifest.get('versions', {}).get('ftcli', '')}"


def list_facts(summary: RunSummary, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of what is worth knowing first."""
    facts = [("steps", f"{summary.steps:,} ({summary.epochs:.4g} epochs), {summary.n_trained_tokens:,} trained tokens")]
    if summary.loss_first is not None and summary.loss_last is not None:
        facts.append(("loss", f"{summary.loss_first:.4f} → {summary.loss_last:.4f}"))
    if summary.trainable_parameters:
        total = (manifest.get("measured") or {}).get("parameters")
        facts.append(("trained", f"{summary.trainable_parameters:,}" + (f" of {total:,} parameters" if total else "")))
    if summary.best_step is not None:
        facts.append(("best", f"step {summary.best_step} in {summary.best_metric}"))
    if summary.seconds is not None:
        facts.append(("time", f"{summary.seconds:,.0f} s, of which steps {summary.train_seconds:,.0f} s"))
    if summary.forecast_bytes and summary.measured_bytes:
        error = summary.forecast_bytes / summary.measured_bytes - 1
        measured, foretold = (f"{size / 1e6:,.0f} MB" for size in (summary.measured_bytes, summary.forecast_bytes))
        text = f"{measured}, forecast {foretold} ({error:+.1%})"
        facts.append(("memory", text))
    if (processes := manifest.get("processes", 1)) > 1:
        facts.append(("processes", str(processes)))
    return facts


def _write_facts(facts: list[tuple[str, str]]) -> Iterator[str]:
    yield '<table class="facts">'
    for label, text in facts:
        yield f"<tr><td>{write_text(label)}</td><td>{write_text(text)}</td></tr>"
    yield "</table>"


def _draw_run(run: RunFolder, summary: RunSummary, manifest: Mapping[str, Any]) -> Iterator[str]:
    metrics = _read_finite(run, "loss", "grad_norm", "lr")
    steps = [entry["step"] for entry in metrics]
    if not steps:
        return
    curves = [Curve("training", steps, [entry["loss"] for entry in metrics])]
    evals = [entry for entry in read_evals(run) if math.isfinite(entry["loss"])]
    curves += _divide(evals, "loss")
    yield draw_curves("loss", "nats a token", curves)
    scored = [entry for entry in evals if entry["score"] is not None]
    if scored:
        yield draw_curves("score", "share of rows", list(_divide(scored, "score")), limits=(0, 1.02))
    yield draw_curves("learning rate", "", [Curve("lr", steps, [entry["lr"] for entry in metrics])])
    yield draw_curves("gradient norm", "before clipping", [Curve("norm", steps, [e["grad_norm"] for e in metrics])])
    timing = read_lines(run.timing, "step", "tokens_per_second", "memory_bytes")
    steps = [entry["step"] for entry in timing]
    if not steps:
        return
    speed = Curve("speed", steps, [entry["tokens_per_second"] for entry in timing])
    yield draw_curves("throughput", "tokens a second", [speed], limits=(0, None))
    is_cuda = (manifest.get("forecast") or {}).get("device") == "cuda"
    start = 0 if is_cuda else (manifest.get("measured") or {}).get("start_rss_bytes") or 0
    sizes = [entry["memory_bytes"] - start for entry in timing]
    unit, name = (1e9, "GB") if max(*sizes, summary.forecast_bytes or 0) >= 1e9 else (1e6, "MB")
    used = [Curve("between steps", steps, [size / unit for size in sizes])]
    for label, size in (("peak", summary.measured_bytes), ("forecast", summary.forecast_bytes)):
        used += [Curve(label, [], [size / unit], "level")] if size else []
    yield draw_curves("memory", f"{name} for model and training", used, limits=(0, None))


def _divide(evals: Sequence[Mapping[str, Any]], key: str) -> Iterator[Curve]:
    """Yields a curve of ``key`` for each held-out set."""
    for name in dict.fromkeys(entry["dataset"] for entry in evals):
        own = [entry for entry in evals if entry["dataset"] == name]
        yield Curve(name, [entry["step"] for entry in own], [entry[key] for entry in own], "points")


def _read_finite(run: RunFolder, *keys: str) -> list[dict[str, Any]]:
    entries = read_lines(run.metrics, "step", *keys)
    return [e for e in entries if all(isinstance(e[key], int | float) and math.isfinite(e[key]) for key in keys)]


def _write_evals(run: RunFolder, summary: RunSummary) -> Iterator[str]:
    if not summary.evals:
        return
    yield '<h2>Held-out rows</h2><div class="scroll"><table><tr><th>step</th><th class="text">set</th><th>loss</th>'
    yield f"<th>{write_text(summary.evals[0].metric or 'score')}</th></tr>"
    entries = read_evals(run)
    for entry in entries[-_MOST_ROWS:]:
        score = "" if entry["score"] is None else f"{entry['score']:.1%}"
        kept = " (saved)" if entry["step"] == summary.artifact_step else ""
        yield (
            f'<tr><td>{entry["step"]:,}{kept}</td><td class="text">{write_text(entry["dataset"])}</td>'
            f"<td>{entry['loss']:.4f}</td><td>{score}</td></tr>"
        )
    yield "</table></div>"
    if len(entries) > _MOST_ROWS:
        yield f'<p class="soft">the last {_MOST_ROWS} of {len(entries)}; all are in eval.jsonl</p>'


def _write_prompts(run: RunFolder) -> Iterator[str]:
    answers = read_lines(run.prompts, "step", "prompt", "text")
    if not answers:
        return
    yield "<h2>Answers on the way</h2>"
    for prompt in dict.fromkeys(str(entry["prompt"]) for entry in answers):
        yield f"<details open><summary><b>{write_text(prompt)}</b></summary>"
        yield '<table class="answers"><tr><th>step</th><th>answer</th></tr>'
        for entry in [entry for entry in answers if entry["prompt"] == prompt][-_MOST_ROWS:]:
            yield f"<tr><td>{entry['step']:,}</td><td>{_write_answer(str(entry['text']))}</td></tr>"
        yield "</table></details>"


def _write_changes(summary: RunSummary) -> Iterator[str]:
    if not summary.samples:
        return
    yield "<h2>Held-out answers, before and after</h2>"
    yield '<div class="scroll"><table class="answers wide">'
    yield "<tr><th>asked</th><th>before</th><th>after</th><th>wanted</th></tr>"
    ordered = sorted(summary.samples, key=lambda s: (s.is_right == s.was_right, s.is_right))
    for sample in ordered[:_MOST_ROWS]:
        yield _write_sample(sample)
    yield "</table></div>"
    if len(ordered) > _MOST_ROWS:
        yield f'<p class="soft">{_MOST_ROWS} of {len(ordered)} rows; all are in samples/</p>'


def _write_sample(sample: SampleChange) -> str:
    cells = [
        f"<td>{write_text(sample.question)}</td>",
        *(
            f'<td class="{"right" if is_right else "wrong"}">{"✓" if is_right else "✗"} {_write_answer(text)}</td>'
            for text, is_right in ((sample.before, sample.was_right), (sample.after, sample.is_right))
        ),
        f"<td>{write_text(sample.reference)}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _write_answer(text: str) -> str:
    return write_text(text.strip()) or '<span class="soft">(nothing)</span>'


def _write_sources(run: RunFolder, manifest: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Recipe</h2>"
    if run.recipe.is_file():
        yield f"<pre>{write_text(run.recipe.read_text(encoding='utf-8', errors='replace'))}</pre>"
    base = manifest.get("base") or {}
    rows = [("base", str(base.get("id"))), ("revision", str(base.get("revision") or "none")),
            ("fingerprint", str(base.get("fingerprint")))]  # fmt: skip
    rows += [(key.removesuffix("_sha256"), str(manifest.get(key))) for key in (
        "tokenizer_sha256", "template_sha256", "data_sha256", "recipe_sha256")]  # fmt: skip
    rows += [(name, str(version)) for name, version in (manifest.get("versions") or {}).items()]
    rows += [(name, str(entry.get("sha256"))) for name, entry in (manifest.get("files") or {}).items()]
    yield "<h2>Provenance</h2><details><summary>hashes and versions</summary>"
    yield from _write_facts(rows)
    yield "</details>"
