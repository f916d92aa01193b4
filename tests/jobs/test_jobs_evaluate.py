"""Runs, adapters and models side by side: what is measured and told, and what is refused before any is loaded."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMOLLM2, build_model, build_tokenizer, save_model

from ftcli.cli.app import app
from ftcli.cli.scoreboard import list_scoreboard, shorten_middle
from ftcli.errors import ContentError, DiskError, FtcliError, NumericError, UsageError
from ftcli.evaluate import subject
from ftcli.events import Notice
from ftcli.jobs import evaluate
from ftcli.jobs.entry import Measure
from ftcli.jobs.evaluate import Score, Scoreboard, Standing, evaluate_targets
from ftcli.train.run import train


def write_rows(path: Path, answers: list[str]) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": answer}]}
        for i, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_tokenizer: Any) -> Path:
    """A folder with a finished LoRA run, a finished full one, a model of other weights, and one of other tokens."""
    root = tmp_path_factory.mktemp("evaluate")
    write_rows(root / "train.jsonl", [f"answer {i * 7 % 10}" for i in range(12)])
    write_rows(root / "held_out.jsonl", ["answer 1", "größer als 2", "answer 3"])
    recipe: dict[str, Any] = {
        "model": {"name_or_path": str(tiny_model), "dtype": "float32"},
        "peft": {"r": 4, "lora_alpha": 8},
        "datasets": [{"path": "train.jsonl"}],
        "data": {"max_length": 64, "packing": False},
        "train": {"learning_rate": 1e-2, "max_steps": 4, "gradient_checkpointing": False},
        "eval": {"datasets": [{"path": "held_out.jsonl"}]},
        "output_dir": str(root / "runs" / "lora"),
    }
    full = recipe | {"peft": None, "output_dir": str(root / "runs" / "full")}
    for name, sections in (("full", full), ("lora", recipe)):
        (root / f"{name}.yaml").write_text(yaml.safe_dump(sections))
        train(root / f"{name}.yaml")
    save_model(root / "other", build_model(seed=3), tiny_tokenizer)
    save_model(root / "short", build_model(vocab_size=264), build_tokenizer(264))
    return root


def read_last_loss(run: Path) -> float:
    return float(json.loads((run / "eval.jsonl").read_text().splitlines()[-1])["loss"])


def test_a_run_its_base_and_others_side_by_side(place: Path, tiny_model: Path) -> None:
    run, events = place / "runs" / "lora", []
    targets = [str(run), str(run / "adapter"), str(place / "runs" / "full"), str(place / "other")]
    found = evaluate_targets(targets, compare_base=True, on_event=events.append)
    tuned, base, adapter, full, other = found.standings
    assert [row.target for row in found.standings] == [targets[0], str(tiny_model), *targets[1:]]
    assert found.data == f"held_out of {run}"
    assert (found.n_rows, found.notices) == (3, ())
    assert tuned.loss == pytest.approx(read_last_loss(run), rel=1e-6)
    assert full.loss == pytest.approx(read_last_loss(place / "runs" / "full"), rel=1e-6)
    assert base.loss == pytest.approx(json.loads((run / "eval.jsonl").read_text().splitlines()[0])["loss"], rel=1e-6)
    assert (tuned.kl, tuned.top1) == (None, None)
    assert adapter.kl == pytest.approx(0, abs=1e-7)
    assert adapter.top1 == 1
    assert all(row.kl is not None and row.kl > 1e-3 for row in (base, full, other))
    size = (tiny_model / "model.safetensors").stat().st_size
    assert base.size_bytes == other.size_bytes == size
    assert tuned.size_bytes == size + (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert {row.bits_per_weight for row in found.standings} == {32.0}
    assert {row.perplexity for row in found.standings} == {math.exp(row.loss) for row in found.standings}


def test_one_model_is_in_memory_at_a_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    alive: list[Any] = []
    load = subject.load_plain

    def watch(*arguments: Any) -> Any:
        gc.collect()
        assert not any(model() for model in alive)
        model = load(*arguments)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(subject, "load_plain", watch)
    targets = [str(place / "runs" / "lora"), str(place / "other")]
    evaluate_targets(targets, Measure(metric="exact_match", max_new_tokens=2), compare_base=True)
    assert len(alive) == 2  # the base is the run's own model with its adapter off
    evaluate_targets([str(place / "runs" / "full")], compare_base=True)
    assert len(alive) == 4


def test_other_tokens_are_compared_by_bytes(place: Path, tiny_model: Path) -> None:
    data = str(place / "held_out.jsonl")
    found = evaluate_targets([str(tiny_model), str(place / "short"), str(tiny_model)], Measure(data=data))
    first, short, again = found.standings
    n_bytes = len("answer 1größer als 2answer 3".encode())
    for row in found.standings:
        assert row.bits_per_byte == pytest.approx(row.loss * row.n_tokens / math.log(2) / n_bytes)
    assert (short.kl, short.top1) == (None, None)
    assert first.n_tokens != short.n_tokens
    assert again.kl == pytest.approx(0, abs=1e-7)
    assert "bits per byte" in found.notices[0]
    assert found.n_tokens == first.n_tokens


def test_rows_of_a_run_may_be_longer_in_other_tokens(place: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((place / "lora.yaml").read_text())
    write_rows(place / "longer.jsonl", ["the quick brown fox jumps"] * 2)
    recipe |= {"datasets": [{"path": "longer.jsonl"}], "data": {"max_length": 42}, "output_dir": str(tmp_path / "run")}
    recipe["train"]["max_steps"] = 1
    (place / "longer.yaml").write_text(yaml.safe_dump(recipe))
    train(place / "longer.yaml")
    tuned, other = evaluate_targets([str(tmp_path / "run"), str(place / "short")]).standings
    assert other.n_tokens > tuned.n_tokens


def test_windows_and_limit(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"the quick brown fox {i} " * 30}) + "\n" for i in range(3)))
    whole = evaluate_targets([str(tiny_model)], Measure(data=str(path)))
    cut = evaluate_targets([str(tiny_model)], Measure(data=str(path), max_length=40, stride=8))
    assert whole.n_tokens == cut.n_tokens > 300
    assert whole.standings[0].loss == pytest.approx(cut.standings[0].loss, rel=0.05)
    assert whole.standings[0].loss != cut.standings[0].loss
    assert cut.notices == ("3 of 3 documents are longer than 40 tokens and are read in windows",)
    two = evaluate_targets(
        [str(tiny_model)], Measure(data=str(path), limit=2, max_new_tokens=9999)
    )  # none are asked for
    assert (two.n_rows, two.n_tokens) == (2, whole.n_tokens * 2 // 3)
    beyond = evaluate_targets([str(place / "runs" / "lora")], Measure(limit=99))
    assert beyond.n_rows == 3


@pytest.mark.parametrize(
    ("metric", "pattern", "value"),
    [("exact_match", None, 1 / 3), ("regex", r"\w+", 2 / 3), ("rouge", None, (1 + 0.5 + 0) / 3), ("bleu", None, None)],
)
def test_scores(
    place: Path, metric: str, pattern: str | None, value: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if metric in ("rouge", "bleu"):
        pytest.importorskip({"rouge": "torchmetrics", "bleu": "sacrebleu"}[metric])
    answers = ["answer 1", "no", "answer 4"]  # to questions of one length, so in their order
    monkeypatch.setattr(subject.TorchBackend, "generate", lambda self, prompts, sampling: answers[: len(prompts)])
    wanted = Measure(metric=metric, pattern=pattern, batch_rows=3)
    (row,) = evaluate_targets([str(place / "runs" / "lora")], wanted).standings
    assert row.score is not None
    assert (row.score.metric, row.score.n) == (metric, 3)
    assert 0 < row.score.value < 1
    if value is not None:
        assert row.score.value == pytest.approx(value)


def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    place: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(evaluate, "open_target", load)
    monkeypatch.setattr(subject, "load_plain", load)
    model, run, data = str(tiny_model), str(place / "runs" / "lora"), str(place / "held_out.jsonl")
    unasked, no_json = tmp_path / "unasked.jsonl", write_rows(tmp_path / "no_json.jsonl", ["x", "y"])
    unasked.write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "x y z"}\n')
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "manifest.json").write_text('{"schema": 1, "state": "interrupted"}')
    holed = tmp_path / "holed"
    save_model(holed, build_model(), build_tokenizer())
    (holed / "model.safetensors").rename(holed / "model-00001-of-00002.safetensors")
    weights = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (holed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    cases: list[tuple[list[str], Measure, bool, type[FtcliError], str]] = [
        ([model, str(tmp_path / "absent")], Measure(data=data), False, UsageError, "no such file or folder"),
        ([str(place / "lora.yaml")], Measure(data=data), False, UsageError, "is a recipe"),
        ([str(unfinished)], Measure(), False, ContentError, "interrupted, not finished"),
        ([model, str(holed)], Measure(data=data), False, ContentError, "missing"),
        ([model], Measure(), False, UsageError, "which rows?"),
        ([model], Measure(data=data), True, UsageError, "no base to compare with"),
        ([model], Measure(data=str(tmp_path / "absent.jsonl")), False, UsageError, "no such file"),
        ([model], Measure(data=str(unasked)), False, ContentError, "no assistant turn"),
        ([model], Measure(data=str(text), metric="exact_match"), False, ContentError, "no row ends with an answer"),
        ([model], Measure(data=no_json, metric="json"), False, ContentError, "is no JSON"),
        ([model], Measure(data=data, metric="chrf"), False, UsageError, "no score chrf"),
        ([model], Measure(data=data, pattern="x"), False, UsageError, "regex alone"),
        ([model], Measure(data=data, metric="regex", pattern="("), False, UsageError, "no regular expression"),
        ([model], Measure(data=data, metric="json", max_new_tokens=510), False, ContentError, "is no JSON"),
        ([model], Measure(data=data, metric="exact_match", max_new_tokens=510), False, UsageError, "context of 512"),
        ([model], Measure(data=data, max_length=513), False, UsageError, "context of 512"),
        ([run], Measure(max_length=8, stride=8), False, UsageError, "a stride of 8"),
    ]
    for targets, wanted, with_base, kind, text_of_error in cases:
        with pytest.raises(kind, match=text_of_error.replace("?", r"\?")):
            evaluate_targets(targets, wanted, compare_base=with_base)


def test_weights_that_are_no_numbers_name_their_target(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    broken = build_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    folder = save_model(tmp_path / "broken", broken, build_tokenizer())
    with pytest.raises(NumericError, match="not finite") as caught:
        evaluate_targets([str(tiny_model), str(folder)], Measure(data=str(place / "held_out.jsonl")))
    assert caught.value.where == str(folder)


def test_the_recording_is_gone_however_it_ends(
    place: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wanted, seen = Measure(data=str(place / "held_out.jsonl")), []

    def interrupt(recording: Any, *_: Any, **__: Any) -> None:
        seen.append(recording.path.stat().st_size)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate_targets([str(tiny_model), str(place / "other")], wanted)
    assert seen[0] > 0
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    evaluate_targets([str(tiny_model)], wanted)  # nothing to compare: nothing is recorded
    with pytest.raises(DiskError, match="no temporary folder"):
        evaluate_targets([str(tiny_model), str(place / "other")], wanted)


def test_data_that_changed_since_the_run_is_told(place: Path) -> None:
    path = place / "held_out.jsonl"
    before = path.read_text()
    try:
        write_rows(path, ["answer 1", "answer 2"])
        notices: list[Any] = []
        found = evaluate_targets([str(place / "runs" / "lora")], on_event=notices.append)
    finally:
        path.write_text(before)
    assert "the data is not what it was" in found.notices[0]
    assert Notice(found.notices[0]) in notices


def test_the_command(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            app(["eval", *words])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    code, out, err = run("--compare-base", "--score", "exact_match", "--max-new-tokens", "2")
    assert code == 0
    assert "runs/lora is the newest finished run" in err
    assert all(len(line) <= 80 for line in out.splitlines())
    lines = out.splitlines()
    assert lines[0].split() == ["target", "size", "bits/w", "loss", "ppl", "KL", "top-1", "score"]
    assert lines[1].startswith("runs/lora ")
    assert "3 rows" in lines[4]
    code, out, err = run("runs/lora", "other", "--data", "held_out.jsonl", "--limit", "1", "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert list(document) == ["schema", "command", "data", "n_rows", "n_tokens", "targets", "notices"]
    assert (document["command"], document["data"], document["n_rows"]) == ("eval", "held_out.jsonl", 1)
    assert list(document["targets"][1]) == [
        "target", "bytes", "bits_per_weight", "loss", "perplexity", "bits_per_byte", "kl", "top1", "score",
    ]  # fmt: skip
    assert run("other")[0] == 2
    assert run("other", "--data", "train.yaml")[0] == 2


def build_standing(target: str, **changes: Any) -> Standing:
    values = {"size_bytes": 140 * 10**9, "bits_per_weight": 16.0, "loss": 2.5, "n_tokens": 9} | changes
    values = {"kl": 0.0123, "top1": 0.987, "bits_per_byte": 1.2, "score": Score("bleu", 0.5, 9)} | values
    return Standing(target, **values)


@pytest.mark.parametrize("width", [80, 120])
def test_every_column_fits_the_width(width: int) -> None:
    rows = (
        build_standing("/home/somebody/projects/models/gguf/a-model-of-mine-Q4_K_M.gguf", kl=None, top1=None),
        build_standing("b", loss=1000.0, kl=math.inf, bits_per_byte=None, score=None),
        build_standing("c", loss=12.0, kl=3e-9),
    )
    lines = list(list_scoreboard(Scoreboard("/data/" + "x" * 200 + ".jsonl", 1, rows, ()), width))
    assert max(map(len, lines)) <= width
    assert "Q4_K_M.gguf" in lines[1]
    assert "inf" in lines[2]
    assert "<1e-6" in lines[3]
    assert "162,755" in lines[3]


def test_shortened_names_keep_their_end() -> None:
    assert shorten_middle("abcdefghij", 10) == "abcdefghij"
    assert shorten_middle("abcdefghij", 7) == "ab…ghij"


@pytest.mark.real
def test_the_embedded_model_against_itself(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ["Paris is the capital of France.", "Two and two is four."])
    first, again = evaluate_targets([SMOLLM2, SMOLLM2], Measure(data=data)).standings
    assert first.loss == again.loss
    assert again.kl == pytest.approx(0, abs=1e-7)
    assert 4 < first.bits_per_weight < 7
