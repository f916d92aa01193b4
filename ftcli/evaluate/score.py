"""Right or wrong: an answer held against its reference. Or how much of it is said: ROUGE and BLEU."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import regex

from ftcli.errors import UsageError

_MOST_SECONDS = 1.0
_PACKAGES = {"rouge": "torchmetrics", "bleu": "sacrebleu"}  # of the extra `metrics`


def score_exact_match(answer: str, reference: str) -> bool:
    """Whether both texts are the same, blanks around them apart."""
    return answer.strip() == reference.strip()


def score_json(answer: str, reference: str) -> bool:
    """Whether both texts are JSON of equal value: order of keys and blanks do not count, 1 equals 1.0."""
    try:
        return _are_equal(json.loads(answer), json.loads(reference))
    except (ValueError, RecursionError):
        return False


def _are_equal(first: Any, second: Any) -> bool:
    """Equality of JSON values; ``true`` is not 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_are_equal(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_are_equal, first, second))
    return bool(first == second)


def score_regex(answer: str, reference: str, pattern: str | None = None) -> bool:
    """Whether ``pattern`` finds the same in both texts: its groups, or the whole match; the first one counts.

    Without a pattern ``reference`` itself is one, and the question is whether ``answer`` holds it.

    Raises:
        TimeoutError: an expression that takes more than a second.
    """
    if pattern is None:
        return _search(reference.strip(), answer) is not None
    found, wanted = _search(pattern, answer), _search(pattern, reference)
    if found is None or wanted is None:
        return False
    return bool((found.groups() or found.group()) == (wanted.groups() or wanted.group()))


def _search(pattern: str, text: str) -> Any:
    """The first match; None where there is none, or the pattern is none.

    Raises:
        TimeoutError: it took longer than a second, as nested repetitions can.
    """
    try:
        return regex.search(pattern, text, timeout=_MOST_SECONDS)
    except regex.error:
        return None


def check_reference(reference: str, metric: str, pattern: str | None = None) -> str:
    """What is wrong with a row's reference for this score, in words; empty if nothing is."""
    if metric == "regex" and pattern is not None:
        try:
            if not _search(pattern, reference):
                return "the regex finds nothing in the row's answer, so no answer could be right"
        except TimeoutError:
            return "the regex takes more than a second on the row's answer"
    if metric == "regex" and pattern is None:
        try:
            regex.compile(reference.strip())
        except regex.error as error:
            return f"the row's answer is no regular expression ({error})"
    if metric == "json":
        try:
            json.loads(reference)
        except (ValueError, RecursionError):
            return "the row's answer is no JSON, so no answer could be right"
    return ""


def build_score(metric: str, pattern: str | None = None) -> Callable[[str, str], bool]:
    """The function that takes an answer and its reference, and says whether it is right."""
    if metric == "regex":
        return partial(score_regex, pattern=pattern)
    return {"exact_match": score_exact_match, "json": score_json}[metric]


def check_package(metric: str) -> None:
    """None if the package that this score needs, if any, is installed.

    Raises:
        UsageError: naming the command to install it.
    """
    package = _PACKAGES.get(metric)
    if package and importlib.util.find_spec(package) is None:
        raise UsageError(f"the score {metric} needs the package {package}", hint=f"run: pip install {package}")


def score_rouge(answers: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-L: the mean F1 of the longest common subsequence of words, from 0 to 1.

    Words are runs of letters and digits in lower case, of any script; on ASCII that is what rouge-score counts.
    """
    from torchmetrics.functional.text.rouge import rouge_score

    def normalize(text: str) -> str:
        return str(regex.sub(r"[\W_]+", " ", text.lower()))

    found = rouge_score(list(answers), list(references), rouge_keys="rougeL", normalizer=normalize)
    return float(found["rougeL_fmeasure"])


def score_bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of all answers together, as sacrebleu computes it by default, but from 0 to 1.

    Where no answer has four words, the longest n-grams that there are count (sacrebleu's effective order): else a
    set of short answers that are all right would score 0.
    """
    from sacrebleu import corpus_bleu

    found = corpus_bleu(list(answers), [list(references)], use_effective_order=True)
    return min(1.0, float(found.score) / 100)
