"""ROUGE-L and BLEU, by numbers that were worked out by hand and by rouge-score and sacrebleu's command line."""

from __future__ import annotations

import importlib.util
import math

import pytest

from ftcli.errors import UsageError
from ftcli.evaluate.score import check_package, score_bleu, score_rouge


def test_rouge() -> None:
    pytest.importorskip("torchmetrics")
    # longest common subsequence "is name john" of 4 and 5 words: 2·3 / 9; then nothing in common
    assert score_rouge(["My NAME is, John!"], ["is your name John"]) == pytest.approx(2 / 4)
    assert score_rouge(["is the name John"], ["this is your name, John"]) == pytest.approx(6 / 9)
    assert score_rouge(["a b", "x"], ["a b", "y"]) == pytest.approx(0.5)
    assert score_rouge(["", "Größe über_alles"], ["y", "größe ÜBER alles"]) == pytest.approx(0.5)
    answer, reference = "The quick brown fox jumps over the lazy dog", "A fast brown fox leaps over a lazy dog"
    assert score_rouge([answer], [reference]) == pytest.approx(0.5555556)  # rouge-score 0.1.2


def test_bleu() -> None:
    pytest.importorskip("sacrebleu")
    answers = ["The dog bit the man.", "It was not surprising.", "The man had just bitten him."]
    references = ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]
    assert score_bleu(answers, references) == pytest.approx(0.283126, abs=5e-5)
    assert score_bleu(["Paris", "Rome"], ["Paris", "Rome"]) == 1
    assert score_bleu(["Paris", "Oslo"], ["Paris", "Rome"]) == pytest.approx(0.5)
    long = ["one two three four", "five six seven eight"]
    assert score_bleu(long, long) == pytest.approx(1)
    brevity = math.exp(1 - 8 / 7)
    assert score_bleu(["one two three four", "five six seven"], long) == pytest.approx(brevity)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for metric, package in (("rouge", "torchmetrics"), ("bleu", "sacrebleu")):
        with pytest.raises(UsageError, match=f"the score {metric} needs") as caught:
            check_package(metric)
        assert caught.value.hint == f"run: pip install {package}"
    check_package("exact_match")
