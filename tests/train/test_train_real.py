"""The embedded real model: the quickstart's first steps in every way to train, and its loss recomputed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMOLLM2
from torch.nn import functional

from ftcli.recipe import load_recipe
from ftcli.store.run import read_lines
from ftcli.train.loop import plan_steps
from ftcli.train.prepare import prepare_run
from ftcli.train.run import train

pytestmark = pytest.mark.real
RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SHORT = ("eval=null", "train.max_steps=3", "data.max_length=256")


@pytest.mark.parametrize(
    "overrides",
    [(), ("quantization={load_in_4bit: true}",), ("peft=null", "train.learning_rate=1e-5")],
    ids=["lora", "nf4", "full"],
)
def test_first_steps(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run = train(RECIPE, overrides=(*SHORT, *overrides, f"output_dir={tmp_path / 'run'}"))
    losses = [entry["loss"] for entry in read_lines(run.metrics)]
    assert 1.0 < losses[0] < 3.0
    assert losses[-1] < losses[0]


def test_first_loss_and_adapter_with_transformers_and_peft_alone(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from ftcli.store.target import find_model

    overrides = (*SHORT, "model.dtype=float32", f"output_dir={tmp_path / 'run'}")
    run = train(RECIPE, overrides=overrides)
    files = find_model(SMOLLM2)
    base: Any = AutoModelForCausalLM.from_pretrained(
        files.folder,
        gguf_file=files.gguf_file,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    prepared = prepare_run(load_recipe(RECIPE, overrides=overrides))
    documents = prepared.split.train.documents
    (group,) = plan_steps(prepared.recipe, documents, epoch=0)[0]
    total, n_targets = 0.0, 0
    with torch.no_grad():
        for index in group:
            ids = torch.tensor([documents[index].ids])
            trained = torch.tensor(documents[index].mask[1:])
            logits = base(ids).logits[0, :-1].float()[trained]
            total += functional.cross_entropy(logits, ids[0, 1:][trained], reduction="sum").item()
            n_targets += int(trained.sum())
    assert read_lines(run.metrics)[0]["loss"] == pytest.approx(total / n_targets, rel=1e-5)
    tuned = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    ids = tokenizer("in 2026", return_tensors="pt").input_ids
    from ftcli.evaluate.subject import open_subject

    with torch.no_grad():
        opened: Any = open_subject(str(run.path)).backend
        ours = opened.model(input_ids=ids, use_cache=False).logits
        assert torch.equal(tuned(input_ids=ids, use_cache=False).logits, ours)
