"""Whole runs on a two-layer model: exact losses, exact resumption, and an adapter that plain PEFT loads."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from ftcli.data.batch import build_batch
from ftcli.data.chat import ChatRenderer
from ftcli.data.example import read_examples
from ftcli.data.plan import plan_epoch
from ftcli.errors import ContentError, DiskError, Interrupted, UsageError
from ftcli.evaluate.loss import compute_loss_sum
from ftcli.evaluate.subject import open_subject
from ftcli.events import EvalDone, StepDone
from ftcli.fused.layer import unfuse
from ftcli.recipe import load_recipe
from ftcli.store.run import RunFolder, locked, read_lines, read_manifest
from ftcli.train.run import train


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def stop_at(step: int, number: int = signal.SIGTERM) -> Any:
    def on_event(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), number)

    return on_event


def test_a_run_leaves_what_the_surface_says(write_recipe: Any) -> None:
    path = write_recipe(eval={"datasets": [{"path": "held_out.jsonl"}], "score": "exact_match", "max_new_tokens": 4})
    run = train(path)
    metrics = read_metrics(run)
    assert [entry["step"] for entry in metrics] == [1, 2, 3, 4, 5, 6]
    assert set(metrics[0]) == {"step", "epoch", "loss", "grad_norm", "lr", "n_target_tokens", "n_tokens", "rows"}
    assert sum(entry["rows"] for entry in metrics[:3]) == 12
    assert metrics[2]["epoch"] == 1.0
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert [set(entry) for entry in read_lines(run.timing)] == [
        {"step", "seconds", "tokens_per_second", "memory_bytes"}
    ] * 6
    assert [(e["step"], e["dataset"]) for e in read_lines(run.eval)] == [(0, "held_out"), (6, "held_out")]
    manifest = read_manifest(run)
    assert manifest["state"] == "finished"
    assert "adapter/adapter_model.safetensors" in manifest["files"]
    assert load_recipe(run.recipe).recipe == load_recipe(path).recipe


def test_first_loss_is_the_base_models_own(write_recipe: Any, tiny_model: Path) -> None:
    """Recomputed with transformers alone, document by document."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write_recipe()
    first = read_metrics(train(path))[0]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    renderer = ChatRenderer(tokenizer)
    documents = [renderer.render(e)[0] for e in read_examples(path.parent / "train.jsonl")]
    recipe = load_recipe(path).recipe
    steps = plan_epoch(
        [len(d.ids) for d in documents],
        seed=recipe.train.seed,
        epoch=0,
        rows_per_batch=2,
        batches_per_step=2,
        pack_tokens=None,
    )
    chosen = [i for group in steps[0] for i in group]
    total, n_targets = 0.0, 0
    for index in chosen:
        ids = torch.tensor([documents[index].ids])
        logits = model(ids).logits[0, :-1].float()
        trained = torch.tensor(documents[index].mask[1:])
        total += functional.cross_entropy(logits[trained], ids[0, 1:][trained], reduction="sum").item()
        n_targets += int(trained.sum())
    assert first["n_target_tokens"] == n_targets
    assert first["loss"] == pytest.approx(total / n_targets, rel=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_equals_rows_apart(tiny_model: Path, write_rows: Any, attention: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    renderer = ChatRenderer(AutoTokenizer.from_pretrained(tiny_model))
    documents = [renderer.render(e)[0] for e in read_examples(write_rows())]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=attention)
    packed = compute_loss_sum(model, build_batch(documents)).item()
    apart = sum(compute_loss_sum(model, build_batch([document])).item() for document in documents)
    assert packed == pytest.approx(apart, rel=1e-6)


def test_resume_refuses_another_recipe_and_a_missing_run(write_recipe: Any) -> None:
    path = write_recipe()
    with pytest.raises(UsageError, match="nothing to resume"):
        train(path, resume=True)
    with pytest.raises(Interrupted):
        train(path, on_event=stop_at(2))
    with pytest.raises(UsageError, match=r"peft\.lora_alpha was 8, now 16: the trained weights would mean"):
        train(path, overrides=("peft.lora_alpha=16",), resume=True)


def test_resume_refuses_changed_data(write_recipe: Any) -> None:
    path = write_recipe()
    with pytest.raises(Interrupted):
        train(path, on_event=stop_at(2))
    data = path.parent / "train.jsonl"
    data.write_text(data.read_text().replace("question 3", "question 33"))
    with pytest.raises(ContentError, match="the data changed since the run was started"):
        train(path, resume=True)


def test_a_signal_in_the_last_evaluation_loses_no_step(write_recipe: Any) -> None:
    path = write_recipe(data={"max_length": 128, "val_set_size": 4})

    def on_event(event: Any) -> None:
        if isinstance(event, EvalDone) and event.step == 0:
            assert event.dataset == "val"
        if isinstance(event, StepDone) and event.step == event.total_steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 6 of 6, which is saved"):
        train(path, on_event=on_event)
    run = train(path, resume=True)
    assert read_manifest(run)["state"] == "finished"
    assert [entry["step"] for entry in read_lines(run.eval)] == [0, 6]


def test_a_second_signal_interrupts_at_once(write_recipe: Any) -> None:
    def on_event(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped by SIGINT at once, in step 3 of 6; no step is saved") as caught:
        train(write_recipe(), on_event=on_event)
    assert caught.value.exit_code == 130


def test_an_existing_run_is_neither_overwritten_nor_shared(write_recipe: Any, tmp_path: Path) -> None:
    path = write_recipe()
    run = train(path)
    before = run.metrics.read_bytes()
    with pytest.raises(UsageError, match="holds a run already"):
        train(path)
    assert run.metrics.read_bytes() == before
    with locked(run), pytest.raises(DiskError, match="another process works"):
        train(path, overwrite=True)
    train(path, overwrite=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="no run of ftcli"):
        train(path, overrides=(f"output_dir={foreign}",), overwrite=True)
    assert (foreign / "thesis.txt").exists()


@pytest.mark.parametrize(
    "peft",
    [
        {"r": 4},
        {"r": 4, "use_rslora": True, "target_modules": "attn"},
        {"r": 4, "use_dora": True},
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"r": 4, "layers_to_transform": "last:1"},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"r": 4, "init_lora_weights": "pissa"},
        {"r": 4, "init_lora_weights": "olora"},
        {"r": 4, "init_lora_weights": False},
    ],
    ids=lambda peft: "-".join(key for key in peft if key != "r") or "plain",
)
def test_plain_peft_loads_the_adapter_with_equal_logits(
    write_recipe: Any, tiny_model: Path, peft: dict[str, Any]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import ftcli.train.execution as run_module

    kept: list[Any] = []
    original = run_module.save_artifact

    def keep_logits(run: Any, prepared: Any, built: Any, weights: Any) -> Path:
        unfuse(built.model)  # what PEFT makes of the same weights, to the bit
        with torch.no_grad():
            kept.append(built.model.eval()(input_ids=torch.arange(40)[None] % 384, use_cache=False).logits)
        return original(run, prepared, built, weights)

    run_module.save_artifact = keep_logits
    try:
        run = train(write_recipe(peft=peft))
    finally:
        run_module.save_artifact = original
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    untouched = base(torch.arange(40)[None] % 384, use_cache=False).logits.detach()
    loaded = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    logits = loaded(input_ids=torch.arange(40)[None] % 384, use_cache=False).logits
    rewrites_base = str(peft.get("init_lora_weights")) in ("pissa", "olora")
    if rewrites_base:  # saved as the difference to the first adapter: one more rounding
        torch.testing.assert_close(logits, kept[0], rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(logits, kept[0])
    assert (logits - untouched).abs().max() > 1e-3


def test_full_fine_tuning_saves_float32_weights(write_recipe: Any, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train(write_recipe(peft=None))
    model, info = AutoModelForCausalLM.from_pretrained(run.model, dtype="auto", output_loading_info=True)
    assert model.dtype is torch.float32
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    eos = model.generation_config.eos_token_id
    assert 2 in (eos if isinstance(eos, list) else [eos])
    assert AutoTokenizer.from_pretrained(run.model).chat_template
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    moved = [
        name
        for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True)
        if not torch.equal(old, new)
    ]
    assert len(moved) == len(list(before.parameters()))


def test_going_on_from_an_adapter_starts_where_it_ended(write_recipe: Any, tmp_path: Path) -> None:
    first = train(write_recipe())
    path = write_recipe(peft={"adapter": str(first.path)}, output_dir=str(tmp_path / "second"))
    second = train(path, overrides=("train.max_steps=2", "train.learning_rate=1e-9"))
    assert read_metrics(second)[0]["loss"] < read_metrics(first)[0]["loss"] * 0.95
    assert read_manifest(second)["parent"] == str(first.path)


def test_nf4_step_gradients_equal_a_dense_model_of_the_same_weights(write_recipe: Any, tmp_path: Path) -> None:
    """bitsandbytes repacks weights for inference in eval mode; training afterwards must not notice."""
    quantized = ("quantization={load_in_4bit: true}", "model.dtype=bfloat16", "train.max_steps=4")
    evaluation = "eval={datasets: [{path: held_out.jsonl}], eval_steps: 1, score: exact_match, max_new_tokens: 2}"
    path = write_recipe()
    plain = train(path, overrides=quantized)
    held_out = evaluation.replace("held_out.jsonl", str(path.parent / "held_out.jsonl"))
    evaluated = train(path, overrides=(*quantized, held_out, f"output_dir={tmp_path / 'evaluated'}"))
    assert plain.metrics.read_bytes() == evaluated.metrics.read_bytes()
    assert len(read_lines(evaluated.eval)) == 5


@pytest.mark.parametrize(
    ("tied", "tokens"), [(True, {"foxtrot": "fox", "zulu": "lazy dog"}), (False, ["foxtrot", "zulu"])]
)
def test_new_tokens_start_at_a_mean_and_travel_with_the_adapter(
    write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any, tied: bool, tokens: Any
) -> None:
    from conftest import build_model, save_model
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    n = len(tiny_tokenizer)
    folder = save_model(tmp_path / "base", build_model(tied=tied, vocab_size=n), tiny_tokenizer)
    model = {"name_or_path": str(folder), "dtype": "float32"}
    path = write_recipe(model=model, tokenizer={"add_tokens": tokens})
    run = train(path)
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    assert tokenizer("a foxtrot").input_ids[-1] == n
    assert tokenizer.decode([n, n + 1], skip_special_tokens=True) == "foxtrotzulu"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = base.get_input_embeddings().weight.detach().clone()
    base.resize_token_embeddings(n + 2, mean_resizing=False)
    tuned = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    ids = torch.tensor([[5, n, 7, n + 1]])
    logits = tuned(input_ids=ids, use_cache=False).logits
    assert logits.shape[-1] == n + 2
    chat_model: Any = open_subject(str(run.path))
    assert torch.equal(chat_model.backend.model(input_ids=ids, use_cache=False).logits, logits)
    still = train(path, overrides=("train.learning_rate=1e-12", f"output_dir={tmp_path / 'still'}"))
    rows = load_file(still.adapter / "adapter_model.safetensors")
    embedded = next(value for name, value in rows.items() if "embed_tokens" in name)
    for row, token in zip(embedded, ("foxtrot", "zulu"), strict=True):
        sources = tiny_tokenizer(tokens[token]).input_ids if isinstance(tokens, dict) else list(range(n))
        torch.testing.assert_close(row, before[sources].mean(dim=0), rtol=1e-5, atol=1e-6)
    assert any("lm_head" in name for name in rows) is not tied


def test_a_token_that_exists_is_refused(write_recipe: Any) -> None:
    with pytest.raises(UsageError, match=r"already in the vocabulary: <\|im_end\|>"):
        train(write_recipe(tokenizer={"add_tokens": ["<|im_end|>"]}))
