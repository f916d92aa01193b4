"""Evaluation on the way: the best checkpoint, early stopping, scores, samples, and losses by role and source."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, save_model
from safetensors.torch import load_file
from torch.nn import functional

from ftcli.data.chat import ChatRenderer
from ftcli.data.example import read_examples
from ftcli.errors import ContentError, Interrupted, NumericError, RecipeError, UsageError
from ftcli.evaluate.loss import DocumentLosses
from ftcli.evaluate.score import score_regex
from ftcli.events import EvalDone, Notice, Sampled, StepDone
from ftcli.store.run import RunFolder, append_line, read_lines, read_manifest
from ftcli.train import best as best_module
from ftcli.train import evaluation
from ftcli.train.best import find_best
from ftcli.train.run import train

HELD_OUT = {"datasets": [{"path": "held_out.jsonl"}]}


def collect(kind: Any) -> tuple[list[Any], Any]:
    events: list[Any] = []
    return events, lambda event: events.append(event) if isinstance(event, kind) else None


def bend_losses(monkeypatch: pytest.MonkeyPatch, values: dict[int, float]) -> None:
    """What ``eval.jsonl`` says after each step is replaced for those who look for the best."""

    def read_bent(path: Path, *_: str) -> list[dict[str, Any]]:
        return [entry | {"loss": values.get(entry["step"], 9.0)} for entry in read_lines(path)]

    monkeypatch.setattr(best_module, "read_lines", read_bent)


def test_rotation_keeps_the_best_and_the_last(write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bend_losses(monkeypatch, {2: 1.0, 4: 3.0, 6: 2.0})
    path = write_recipe(eval={**HELD_OUT, "eval_steps": 2}, checkpoint={"save_steps": 1, "save_total_limit": 1})
    run = train(path)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-000002", "step-000006"]
    manifest = read_manifest(run)
    assert manifest["best"] == {"step": 2, "metric": "loss", "value": 1.0}
    assert manifest["artifact_step"] == 6


def test_a_best_step_that_no_checkpoint_was_due_at_is_saved(write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bend_losses(monkeypatch, {3: 1.0, 6: 2.0})
    run = train(write_recipe(eval={**HELD_OUT, "eval_steps": 3}, checkpoint={"save_steps": None}))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-000003", "step-000006"]


def test_the_artifact_is_the_best_where_the_recipe_says_so(
    write_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bend_losses(monkeypatch, {2: 1.0})
    changes = {"eval": {**HELD_OUT, "eval_steps": 2}, "checkpoint": {"load_best_model_at_end": True}}
    run = train(write_recipe(**changes))
    short = train(write_recipe(), overrides=("train.max_steps=2", f"output_dir={tmp_path / 'short'}"))
    weights = load_file(run.checkpoints / "step-000002" / "weights.safetensors")
    saved = load_file(run.adapter / "adapter_model.safetensors")
    assert {k.replace(".default", ""): v.tolist() for k, v in weights.items()} == {
        k: v.tolist() for k, v in saved.items()
    }
    assert read_manifest(run)["artifact_step"] == 2
    assert read_manifest(short)["artifact_step"] == 2


def test_early_stopping_ends_a_finished_run_with_the_best(write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bend_losses(monkeypatch, {1: 2.0, 2: 1.0, 3: 1.0, 4: 1.5, 5: 0.1})
    path = write_recipe(eval={**HELD_OUT, "eval_steps": 1, "early_stopping_patience": 2})
    notices, on_event = collect(Notice)
    run = train(path, on_event=on_event)
    assert [entry["step"] for entry in read_lines(run.metrics)] == [1, 2, 3, 4]
    assert any(n.text == "stopped early after step 4: no better loss in 2 evaluations since step 2" for n in notices)
    manifest = read_manifest(run)
    assert (manifest["state"], manifest["artifact_step"], manifest["best"]["step"]) == ("finished", 2, 2)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-000002", "step-000004"]
    notices, on_event = collect(Notice)
    train(path, resume=True, on_event=on_event)
    assert [n.text for n in notices] == [f"{run.path} is finished: nothing is left to train"]
    last = ("eval.early_stopping_patience=2", "checkpoint.load_best_model_at_end=false")
    train(path, overrides=last, resume=True)
    assert read_manifest(run)["artifact_step"] == 4
    train(path, overrides=("eval.early_stopping_patience=null",), resume=True)
    assert [entry["step"] for entry in read_lines(run.metrics)] == [1, 2, 3, 4, 5, 6]
    assert read_manifest(run)["best"]["step"] == 5


def test_the_best_is_of_the_metric_that_was_asked_for(tmp_path: Path) -> None:
    from ftcli.recipe import EvalSection

    run = RunFolder(tmp_path)
    values = {0: (0.1, 1.0, 0.1, 1.0), 5: (3.0, 0.2, 1.0, 0.9), 10: (1.0, 0.5, 2.0, 0.1), 15: (1.0, 0.5, 2.5, None)}
    for step, (loss_a, score_a, loss_b, score_b) in values.items():
        append_line(run.eval, {"step": step, "dataset": "a", "loss": loss_a, "score": score_a})
        append_line(run.eval, {"step": step, "dataset": "b.c", "loss": loss_b, "score": score_b})
    expected = {"loss": (10, 1.5, 1), "score": (5, 0.55, 2), "a.loss": (10, 1.0, 1), "b.c.loss": (5, 1.0, 2)}
    expected |= {"a.score": (10, 0.5, 1), "b.c.score": (5, 0.9, 2)}
    for metric, wanted in expected.items():
        found = find_best(run, EvalSection(metric=metric, score="json"))
        assert found is not None
        assert (found.step, pytest.approx(found.value), found.n_since) == wanted, metric


def test_an_evaluation_under_way_does_not_compete(tmp_path: Path) -> None:
    from ftcli.recipe import EvalSection

    run = RunFolder(tmp_path)
    for step, name, loss in ((0, "a", 9.0), (0, "b", 9.0), (2, "a", 2.0), (2, "b", 4.0), (4, "a", 2.5)):
        append_line(run.eval, {"step": step, "dataset": name, "loss": loss, "score": None})
    found = find_best(run, EvalSection())
    assert found is not None
    assert (found.step, found.n_since) == (2, 0)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({**HELD_OUT, "early_stopping_patience": 2}, "needs eval_steps"),
        ({**HELD_OUT, "metric": "score"}, "needs eval.score"),
        ({**HELD_OUT, "metric": "accuracy"}, "loss, score, NAME.loss or NAME.score"),
        ({**HELD_OUT, "score": "regex", "regex": "("}, "no regular expression"),
        ({**HELD_OUT, "regex": "x"}, "needs score: regex"),
        ({"sample_prompts": ["a"], "early_stopping_patience": 2, "eval_steps": 2}, "needs held-out rows"),
        ({**HELD_OUT, "loss_by": ["colour"]}, "role"),
    ],
)
def test_sections_that_mean_nothing_are_refused(write_recipe: Any, section: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        train(write_recipe(eval=section))


def test_a_metric_of_no_data_set_is_refused_before_the_run(write_recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"eval.metric: other.loss is of no held-out data set\nhint: the names are held_"
    ):
        train(write_recipe(eval={**HELD_OUT, "metric": "other.loss"}))
    assert not (tmp_path / "run").exists()


def test_prompts_are_answered_at_each_evaluation(write_recipe: Any) -> None:
    section = {"sample_prompts": ["question 3", "what\nelse"], "max_new_tokens": 4, "eval_steps": 3}
    sampled, on_event = collect(Sampled)
    run = train(write_recipe(eval=section), on_event=on_event)
    lines = read_lines(run.samples / "prompts.jsonl")
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (step, prompt) for step in (0, 3, 6) for prompt in ("question 3", "what\nelse")
    ]
    assert [event.text for event in sampled] == [line["text"] for line in lines]
    assert lines[0]["text"] != lines[-2]["text"]
    assert not run.eval.exists()


def test_losses_by_role_and_source_are_those_of_transformers_alone(
    write_recipe: Any, tmp_path: Path, tiny_model: Path, tiny_tokenizer: Any
) -> None:
    """Two files in one held-out set; recomputed turn by turn, with the mask of each role."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "held"
    folder.mkdir()
    for name, word in (("a", "fox"), ("b", "dog")):
        turns = [("system", f"be {word}"), ("user", "question"), ("assistant", word), ("user", "and")]
        rows = [[*turns, ("assistant", f"no {word} {i}")] for i in range(3)]
        texts = [json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(texts) + "\n")
    path = write_recipe(
        eval={"datasets": [{"path": str(folder)}], "loss_by": ["role", "source"]}, data={"max_length": 128}
    )
    entry = read_lines(train(path).eval)[0]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    renderer = ChatRenderer(tiny_tokenizer)

    def measure(files: list[str], train_on: Any) -> float:
        total, n = 0.0, 0
        for file in files:
            for example in read_examples(folder / file):
                document = renderer.render(example, train_on)[0]
                ids = torch.tensor([document.ids])
                with torch.no_grad():
                    logits = model(ids).logits[0, :-1]
                mask = torch.tensor(document.mask[1:])
                total += functional.cross_entropy(logits[mask], ids[0, 1:][mask], reduction="sum").item()
                n += int(mask.sum())
        return total / n

    both = ["a.jsonl", "b.jsonl"]
    assert entry["loss"] == pytest.approx(measure(both, "assistant"), rel=1e-5)
    for name in both:
        assert entry["loss_by_source"][str(folder / name)] == pytest.approx(measure([name], "assistant"), rel=1e-5)
    for role in ("system", "user", "assistant"):
        assert entry["loss_by_role"][role] == pytest.approx(measure(both, (role,)), rel=1e-5), role


def test_regex_scores() -> None:
    assert score_regex("so it is #### 42.", "work #### 42", r"#### (\d+)")
    assert not score_regex("so it is 42", "work #### 42", r"#### (\d+)")
    assert not score_regex("#### 41", "#### 42", r"#### (\d+)")
    assert score_regex("B)", "B", r"[A-D]")
    assert score_regex("the year 1984", r"\b19\d\d\b")
    assert not score_regex("the year 2084", r"\b19\d\d\b")


def test_references_that_nothing_can_match_are_told_first(write_recipe: Any, tmp_path: Path) -> None:
    section = {**HELD_OUT, "score": "regex", "regex": "#### (.*)", "max_new_tokens": 4}
    with pytest.raises(ContentError, match=r"held_out.jsonl:1: the regex finds nothing in the row's answer"):
        train(write_recipe(eval=section))
    assert not (tmp_path / "run").exists()
    path = write_recipe(eval={**section, "regex": "answer (0)"})
    notices, on_event = collect(Notice)
    train(path, on_event=on_event)
    assert any("3 of 4 rows of held_out cannot be right" in notice.text for notice in notices)


def test_a_held_out_loss_that_is_no_number_stops_the_run(
    write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """Only the held-out rows hold the token whose embedding is infinite."""
    model = build_model(tied=False)
    token = tiny_tokenizer.encode("z")[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = math.inf
    folder = save_model(tmp_path / "model", model, tiny_tokenizer)
    path = write_recipe(model={"name_or_path": str(folder), "dtype": "float32"}, eval={**HELD_OUT, "eval_steps": 2})
    rows = path.parent / "held_out.jsonl"
    rows.write_text(rows.read_text().replace("question", "z"))
    evals, on_event = collect(EvalDone)
    with pytest.raises(NumericError, match="the loss on held_out is nan after step 0") as caught:
        train(path, on_event=on_event)
    assert caught.value.exit_code == 5
    assert not evals
    assert math.isnan(read_lines(RunFolder(tmp_path / "run").eval)[0]["loss"])


def test_a_held_out_loss_that_was_no_number_stops_the_resumed_run_too(
    write_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(eval={**HELD_OUT, "eval_steps": 2}, checkpoint={"save_steps": 1})
    real = evaluation.measure_losses
    calls: list[int] = []

    def measure(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return DocumentLosses((math.nan,), (1,)) if len(calls) == 2 else real(*arguments, **options)

    monkeypatch.setattr(evaluation, "measure_losses", measure)
    with pytest.raises(NumericError, match="after step 2"):
        train(path)
    with pytest.raises(NumericError, match="the loss on held_out is nan after step 2"):
        train(path, resume=True)
    assert read_manifest(RunFolder(tmp_path / "run"))["state"] == "failed"


@pytest.mark.parametrize(
    "section",
    [
        {**HELD_OUT, "score": "exact_match", "max_new_tokens": 600},
        {"sample_prompts": ["a"], "max_new_tokens": 600},
        {"sample_prompts": ["fox " * 600], "max_new_tokens": 4},
    ],
)
def test_answers_without_room_are_refused_before_a_run_is_replaced(write_recipe: Any, section: dict[str, Any]) -> None:
    run = train(write_recipe())
    before = run.metrics.read_bytes()
    with pytest.raises(UsageError, match="do not fit the context of 512"):
        train(write_recipe(eval=section), overwrite=True)
    assert run.metrics.read_bytes() == before
    assert read_manifest(run)["state"] == "finished"


def test_a_first_evaluation_that_fails_brings_the_replaced_run_back(
    write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(write_recipe())
    before = {p.relative_to(run.path): p.read_bytes() for p in run.path.rglob("*") if p.is_file()}

    def fail(*_: Any, **__: Any) -> None:
        raise UsageError("no")

    monkeypatch.setattr(evaluation, "measure_losses", fail)
    with pytest.raises(UsageError):
        train(write_recipe(eval=HELD_OUT), overwrite=True)
    assert {p.relative_to(run.path): p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


def test_expressions_that_are_none_or_take_for_ever_make_an_answer_wrong(write_recipe: Any) -> None:
    path = write_recipe(eval={**HELD_OUT, "score": "regex", "max_new_tokens": 4})
    rows = path.parent / "held_out.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for line, answer in zip(lines, ("(", ".*", "x|", "zzz"), strict=True):
        line["messages"][-1]["content"] = answer
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    notices, on_event = collect(Notice)
    run = train(path, on_event=on_event)
    assert any("1 of 4 rows of held_out cannot be right" in notice.text for notice in notices)
    assert [a["is_right"] for a in read_lines(run.samples / "held_out-000006.jsonl")] == [False, True, True, False]
    with pytest.raises(TimeoutError):
        score_regex("a" * 40 + "!", r"(a|a)*$")


def test_the_best_step_survives_the_loss_of_its_line(
    write_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of the best step is torn out of eval.jsonl; the manifest still knows it, and rotation spares it."""
    changes = {"save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True}
    path = write_recipe(eval={**HELD_OUT, "eval_steps": 1}, checkpoint=changes)
    run = RunFolder(tmp_path / "run")
    losses = {0: 5.0, 1: 4.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: 3.0, 6: 3.0}
    left: list[float] = []
    monkeypatch.setattr(evaluation, "measure_losses", lambda *_, **__: DocumentLosses((left.pop(0),), (1,)))
    left += losses.values()
    whole, best = train(path, overrides=(f"output_dir={tmp_path / 'whole'}",)), 2
    left += losses.values()

    def on_event(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(path, on_event=on_event)
    text = run.eval.read_text()
    run.eval.write_text(text.replace(f'{{"step": {best}, "dataset": "held', '{"'))
    notices, on_notice = collect(Notice)
    train(path, resume=True, on_event=on_notice)
    assert any("eval.jsonl is damaged" in notice.text for notice in notices)
    assert read_manifest(run)["best"]["step"] == read_manifest(run)["artifact_step"] == best
    name = "adapter_model.safetensors"
    assert (run.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


def test_a_damaged_best_checkpoint_leaves_the_last_step_as_the_artifact(
    write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bend_losses(monkeypatch, {2: 1.0})
    path = write_recipe(eval={**HELD_OUT, "eval_steps": 2}, checkpoint={"load_best_model_at_end": True})
    notices: list[str] = []

    def on_event(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 5:
            file = path.parent / "run" / "checkpoints" / "step-000002" / "weights.safetensors"
            file.write_bytes(file.read_bytes()[:-8] + bytes(8))
        if isinstance(event, Notice):
            notices.append(event.text)

    run = train(path, on_event=on_event)
    assert any("the best step, 2, cannot be taken, so the last one is" in text for text in notices)
    assert read_manifest(run)["artifact_step"] == 6
