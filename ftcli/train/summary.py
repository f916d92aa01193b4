"""What came of a run, read from its folder alone: the same after the run as a month later."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ftcli.errors import ContentError
from ftcli.store.run import RunFolder, read_lines, read_manifest
from ftcli.train.best import read_evals

_ANSWER = ("question", "reference", "text", "is_right")


@dataclass(frozen=True)
class EvalSummary:
    """Loss and score on one held-out set, before the first step and after the one that was kept."""

    dataset: str
    loss_before: float | None
    loss_after: float | None
    score_before: float | None
    score_after: float | None
    metric: str | None
    n_rows: int


@dataclass(frozen=True)
class SampleChange:
    """One held-out row, answered before and after training."""

    question: str
    reference: str
    before: str
    after: str
    was_right: bool
    is_right: bool


@dataclass(frozen=True)
class RunSummary:
    """A run as it stands; what was measured is None until it has finished.

    ``artifact_step`` is the step that the artifact is of, ``best_step`` the one that was best in ``best_metric``.
    ``measured_bytes`` is what ``forecast_bytes`` foretold: allocated on the CUDA device, or resident in host memory
    beyond what was there before the model was loaded.
    """

    run: str
    state: str
    base: str
    steps: int
    epochs: float
    loss_first: float | None
    loss_last: float | None
    evals: tuple[EvalSummary, ...]
    samples: tuple[SampleChange, ...]
    n_trained_tokens: int
    train_seconds: float
    seconds: float | None
    peak_rss_bytes: int | None
    forecast_bytes: int | None
    measured_bytes: int | None
    trainable_parameters: int | None
    artifact: str | None
    artifact_step: int | None
    best_step: int | None
    best_metric: str | None

    def to_json(self) -> dict[str, Any]:
        """The document that ``ftcli train --json`` prints, but for its schema and command."""
        first = self.evals[0] if self.evals else None
        score = None
        if first and first.score_after is not None:
            score = {
                "metric": first.metric,
                "before": first.score_before,
                "after": first.score_after,
                "n": first.n_rows,
            }
        return {
            "run": self.run,
            "state": self.state,
            "steps": self.steps,
            "loss_first": self.loss_first,
            "loss_last": self.loss_last,
            "eval_loss": first.loss_after if first else None,
            "score": score,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "adapter": self.artifact,
        }


def summarize_run(run: RunFolder) -> RunSummary:
    """What came of ``run``.

    Raises:
        ContentError: it is no run folder.
    """
    manifest = read_manifest(run)
    metrics = read_lines(run.metrics, "step", "epoch", "loss", "n_target_tokens")
    timing = read_lines(run.timing, "step", "seconds")
    measured = manifest.get("measured") or {}
    is_finished = manifest.get("state") == "finished"
    evals, samples = _summarize_evals(run, manifest.get("artifact_step"))
    best = manifest.get("best") or {}
    return RunSummary(
        run=str(run.path),
        state=str(manifest.get("state")),
        base=str(manifest.get("base", {}).get("id")),
        steps=metrics[-1]["step"] if metrics else 0,
        epochs=metrics[-1]["epoch"] if metrics else 0.0,
        loss_first=metrics[0]["loss"] if metrics else None,
        loss_last=metrics[-1]["loss"] if metrics else None,
        evals=evals,
        samples=samples,
        n_trained_tokens=sum(entry["n_target_tokens"] for entry in metrics),
        train_seconds=sum(entry["seconds"] for entry in timing),
        seconds=measured.get("seconds"),
        peak_rss_bytes=measured.get("peak_rss_bytes"),
        forecast_bytes=(manifest.get("forecast") or {}).get("total_bytes"),
        measured_bytes=_compare_memory(measured),
        trainable_parameters=measured.get("trainable_parameters"),
        artifact=str(run.artifact) if is_finished else None,
        artifact_step=manifest.get("artifact_step"),
        best_step=best.get("step"),
        best_metric=best.get("metric"),
    )


def _summarize_evals(
    run: RunFolder, artifact_step: int | None
) -> tuple[tuple[EvalSummary, ...], tuple[SampleChange, ...]]:
    entries = read_evals(run)
    evals, samples = [], []
    metric = _read_metric(run)
    for name in dict.fromkeys(entry["dataset"] for entry in entries):
        own = [entry for entry in entries if entry["dataset"] == name]
        first, last = own[0], next((entry for entry in own if entry["step"] == artifact_step), own[-1])
        before = first if first["step"] == 0 else None
        after = last if last["step"] > 0 else None
        answers = read_lines(run.path / "samples" / f"{name}-{last['step']:06d}.jsonl", *_ANSWER)
        earlier = read_lines(run.path / "samples" / f"{name}-000000.jsonl", *_ANSWER)
        evals.append(
            EvalSummary(
                dataset=name,
                loss_before=before["loss"] if before else None,
                loss_after=after["loss"] if after else None,
                score_before=before["score"] if before else None,
                score_after=after["score"] if after else None,
                metric=metric if last["score"] is not None else None,
                n_rows=len(answers),
            )
        )
        if after is None or len(earlier) != len(answers):
            continue
        samples += [
            SampleChange(a["question"], a["reference"], b["text"], a["text"], bool(b["is_right"]), bool(a["is_right"]))
            for b, a in zip(earlier, answers, strict=True)
        ]
    return tuple(evals), tuple(samples)


def _read_metric(run: RunFolder) -> str | None:
    import yaml

    try:
        recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ContentError("recipe.yaml is missing or damaged", where=str(run.path)) from error
    section = recipe.get("eval") or {}
    return json.loads(json.dumps(section.get("score")))  # type: ignore[no-any-return]


def _compare_memory(measured: dict[str, Any]) -> int | None:
    if device_bytes := measured.get("allocated_device_bytes"):
        return int(device_bytes)
    start, peak = measured.get("start_rss_bytes"), measured.get("peak_rss_bytes")
    return peak - start if start and peak else None
