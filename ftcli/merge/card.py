"""The merged model's README.md: what it is, what it was made from, and how it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftcli.merge.verify import Verification
from ftcli.store.card import build_front, list_use


def build_card(
    name: str, manifest: Mapping[str, Any], verification: Verification | None, *, datasets: list[str]
) -> str:
    """Markdown with the front matter that the Hub reads."""
    onto = "the dequantized 4-bit weights" if manifest["onto"] == "dequantized" else "the original weights"
    base = manifest["base"]["id"]
    lines = [
        *build_front(base),
        f"# {name}",
        "",
        f"`{base}`, fine-tuned with LoRA and merged by ftcli"
        f" into {onto} ({manifest['dtype']}, one rounding of the float32 sum).",
        "",
    ]
    if datasets:
        lines += [f"Trained on: {', '.join(f'`{path}`' for path in datasets)}.", ""]
    lines += _describe_delta(manifest["delta"])
    lines += ["## Verification", "", *_describe_verification(verification), ""]
    lines += ["## Use", "", "```python", *list_use("."), "```", ""]
    return "\n".join(lines)


_FAILED = "**Failed**: this is not the model that was trained."
_MEANING = (
    "KL is how far the next-token distribution of this model is from that of the adapter on its base, and the bound is",
    "what it may be; top-1 is the share of tokens for which both find the same one the most probable.",
)


def _describe_delta(delta: Mapping[str, Any]) -> list[str]:
    if not delta["modules"]:
        return []
    return [
        f"Of the update of {delta['modules']} modules, {min(1, delta['kept']):.1%} survived the rounding "
        f"(least: {min(1, delta['least_kept']):.1%}, `{delta['least_module']}`).",
        "",
    ]


def _describe_verification(verification: Verification | None) -> list[str]:
    if verification is None:
        return ["Not verified."]
    if not verification.sets:
        return [
            "The models were not compared: tensors were checked one by one instead, against base and adapter. The "
            f"largest error is {verification.worst_error:.2f} of what rounding allows (`{verification.worst_tensor}`).",
            *([] if verification.has_passed else ["", _FAILED]),
        ]
    lines = [
        "Adapter on its base against this model, per trained token:",
        "",
        "| rows | tokens | KL (nats) | bound | top-1 | loss, adapter | loss, merged |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, verdict in verification.sets.items():
        found = verdict.comparison
        cells = [name.replace("_", " "), str(found.n_tokens), f"{found.kl:.5f}", f"{verdict.most_kl:.3f}"]
        cells += [f"{found.top1:.2%}", f"{found.loss_source:.4f}", f"{found.loss_result:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *_MEANING] if verification.has_passed else [*lines, "", _FAILED, "", *_MEANING]
