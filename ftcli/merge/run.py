"""``ftcli merge``: an adapter and its base, checked, summed, written and held against each other.

    run or adapter ─▶ Source ─▶ plan ─▶ shards, config, tokenizer (in a staging folder) ─▶ verified ─▶ final name

Nothing stands under the final name before everything is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftcli.data.chat import Rendered
from ftcli.errors import FtcliError, UsageError, is_memory_error
from ftcli.evaluate.loss import count_targets
from ftcli.evaluate.sample import load_known_rows
from ftcli.evaluate.subject import load_plain
from ftcli.events import Notice, OnEvent, Saved, Stage, ignore_event
from ftcli.merge.adapter import read_adapter
from ftcli.merge.arithmetic import Survival
from ftcli.merge.card import build_card
from ftcli.merge.folder import write_config, write_generation_config, write_tokenizer, write_weights
from ftcli.merge.output import check_output, describe_origin, name_output
from ftcli.merge.plan import Weights, plan_merge
from ftcli.merge.source import Source, find_source
from ftcli.merge.verify import MOST_TOKENS, Verification, fill_weights, verify_models, verify_tensors
from ftcli.model.base import build_skeleton
from ftcli.model.stored import open_dequantized, open_stored
from ftcli.recipe import QuantizationSection
from ftcli.store.file import (
    bring_back,
    describe_files,
    hash_file,
    make_folder,
    staged_folder,
    write_json,
    write_text,
)
from ftcli.store.output import MANIFEST, read_output
from ftcli.store.run import find_owner, locked, read_manifest, update_manifest
from ftcli.store.shard import measure_shards
from ftcli.store.target import ModelFiles
from ftcli.train.memory import explain_lack

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SMALL_FILES_BYTES = 64 << 20  # tokenizer, config, card
_SCRATCH = ".verify"


@dataclass(frozen=True)
class Merged:
    """What came of a merge; ``survivals`` are of the modules that LoRA changed, in the order of the file."""

    source: str
    output: str
    size_bytes: int
    dtype: str
    onto: str
    n_merged: int
    n_copied: int
    survivals: tuple[Survival, ...]
    verification: Verification | None

    @property
    def delta(self) -> dict[str, Any]:
        """What of the whole update survived the rounding, and of which module the least did."""
        total = sum(s.size**2 for s in self.survivals)
        least = min(self.survivals, key=lambda s: s.kept, default=None)
        return {
            "modules": len(self.survivals),
            "kept": sum(s.kept * s.size**2 for s in self.survivals) / total if total else 1.0,
            "noise": (sum((s.noise * s.size) ** 2 for s in self.survivals) / total) ** 0.5 if total else 0.0,
            "least_kept": least.kept if least else 1.0,
            "least_module": least.name.removesuffix(".weight") if least else None,
        }

    def to_json(self) -> dict[str, Any]:
        """The document of ``--json``."""
        return {
            "source": self.source,
            "output": self.output,
            "bytes": self.size_bytes,
            "dtype": self.dtype,
            "onto": self.onto,
            "tensors": {"merged": self.n_merged, "copied": self.n_copied},
            "delta": self.delta,
            "modules": [{"name": s.name, "kept": s.kept, "noise": s.noise, "norm": s.size} for s in self.survivals],
            "verify": self.verification.to_json() if self.verification else None,
        }


def merge(
    target: str | None = None,
    *,
    base: str | None = None,
    output: Path | None = None,
    dtype: str | None = None,
    onto: str = "original",
    data: str | None = None,
    verifies: bool = True,
    overwrite: bool = False,
    on_event: OnEvent = ignore_event,
) -> Merged:
    """The adapter of ``target`` and its base as one model, in a folder that transformers and vLLM load.

    Args:
        target: a run, or an adapter; None is the newest finished run.
        base: the base model, where it lies elsewhere than the adapter says.
        output: the folder; by default ``merged/`` of the run, or ``./NAME-merged``.
        dtype: of the result; None keeps the base's (bfloat16 where that is a GGUF file).
        onto: ``original`` weights, or ``dequantized``: what a run in 4 bits saw.
        data: rows to compare on, instead of those of the run.
        verifies: whether the result is held against the adapter on its base.
        overwrite: replace what an earlier merge left there.
        on_event: told of stages and progress.

    Raises:
        FtcliError: with the exit code of what happened; nothing stands under the final name then. A result that
            failed its verification is there: its ``verification`` says so.
    """
    source = find_source(target, base)
    final = read_output(output) if output else name_output(source)
    bring_back(final)
    check_output(final, source, overwrite=overwrite)
    on_event(Stage("check", f"{source.name} and {source.files.reference}"))
    run = find_owner(source.run, final)
    with locked(run) if run else nullcontext():
        merging = Merging(source, final, DTYPES[dtype] if dtype else None, onto, on_event)
        merged = merging.carry_out(data, verifies, lambda: check_output(final, source, overwrite=overwrite))
        if run:
            found = merged.verification.to_json() if merged.verification else None
            update_manifest(run, verify={**(read_manifest(run).get("verify") or {}), final.name: found})
    on_event(Saved(str(final)))
    return merged


class Merging:
    """A merge under way: what is known of it before a byte is written is in ``plan`` and ``weights``."""

    def __init__(self, source: Source, final: Path, dtype: torch.dtype | None, onto: str, on_event: OnEvent) -> None:
        self.source, self.final, self.onto, self.on_event = source, final, onto, on_event
        self.skeleton: Any = build_skeleton(source.files, source.section)
        self.stored = open_stored(source.files, self.skeleton)
        self.weights = self._open_weights(onto)
        adapter = read_adapter(source.adapter)
        self.plan = plan_merge(adapter, self.weights, self._build_skeleton(), dtype=dtype, packed_dtype=torch.bfloat16)

    def carry_out(self, data: str | None, verifies: bool, check_final: Callable[[], None]) -> Merged:
        """What came of it, once the folder stands under its final name, which ``check_final`` finds free at the end."""
        instead = "tensors are checked"
        sets = load_known_rows(self.source, data, MOST_TOKENS, self.on_event, instead=instead) if verifies else {}
        n_tokens = sum(n for documents in sets.values() for n in count_targets(documents))
        needed = measure_shards([part.tensor for part in self.plan.parts]) + _SMALL_FILES_BYTES
        needed += 2 * n_tokens * self.plan.vocab_size
        with staged_folder(self.final, needed) as folder:
            self.write_texts(folder)
            self.on_event(Stage("merge", f"{len(self.plan.parts)} tensors"))
            survivals = write_weights(folder, self.plan, self.weights, self.on_event)
            merged = self._describe(tuple(survivals), self._verify(folder, sets) if verifies else None)
            self._write_records(folder, merged)
            check_final()
        return merged

    def write_texts(self, folder: Path) -> None:
        """Nothing; config, generation config and tokenizer of the result lie in ``folder``."""
        files, adapter = self.source.files, self.source.adapter
        write_config(folder, files, self.skeleton, self.plan)
        write_tokenizer(folder, files, adapter)
        write_generation_config(folder, files, adapter, self.skeleton, self._list_stops())

    def _build_skeleton(self) -> Any:
        return build_skeleton(self.source.files, self.source.section)

    def _open_weights(self, onto: str) -> Weights:
        if onto == "original":
            return self.stored
        quantization = self.source.quantization
        if quantization is None:
            if self.source.run:
                raise UsageError(
                    "the run held its base in 16 bits: there is nothing dequantised",
                    where="--onto dequantized",
                    hint="merge onto the original weights",
                )
            quantization = QuantizationSection()
            self.on_event(Notice("nothing says how the base was held in 4 bits: NF4 with double quantisation is taken"))
        return open_dequantized(self.stored, self._build_skeleton(), quantization, self.source.dtype)

    def _list_stops(self) -> list[int]:
        """What ends a trained turn, where the adapter's own generation config does not say it."""
        if (self.source.adapter / "generation_config.json").exists():
            return []
        try:
            return self.source.renderer.end_of_turn_ids
        except FtcliError:  # no template, or one without an end
            return []

    def _verify(self, folder: Path, sets: Mapping[str, Sequence[Rendered]]) -> Verification:
        n_parameters = sum(part.tensor.size_bytes // part.dtype.itemsize for part in self.plan.parts)
        if sets and (lack := explain_lack(n_parameters, getattr(torch, self._compute_dtype))):
            self.on_event(Notice(f"the model is not run, as {lack}: its tensors are checked one by one instead"))
        elif sets:
            scratch = folder / _SCRATCH
            make_folder(scratch)
            try:
                return verify_models(
                    self.source.open,
                    lambda: self._load_result(folder),
                    sets,
                    scratch,
                    change_base=self._choose_other(),
                    on_event=self.on_event,
                )
            except Exception as error:
                if not is_memory_error(error):
                    raise
                self.on_event(Notice("the model does not fit in memory: its tensors are checked one by one instead"))
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        self.on_event(Stage("verify", f"{len(self.plan.parts)} tensors"))
        return verify_tensors(folder, self.plan, self.weights)

    def _load_result(self, folder: Path) -> Any:
        files = ModelFiles(str(self.final), folder)
        return load_plain(files, self.source.section.model_copy(update={"dtype": self._compute_dtype}))

    @property
    def _compute_dtype(self) -> str:
        """What the result is run in: as the source is, but never in less than its own precision."""
        if any(part.dtype != torch.bfloat16 for part in self.plan.parts if part.lora):
            return "float32"
        return str(self.source.dtype).removeprefix("torch.")

    def _choose_other(self) -> Callable[[Any], None] | None:
        """Fills a model with the merge onto the base that was not chosen, for a run in 4 bits."""
        if self.source.quantization is None:
            return None
        other = self._open_weights("original" if self.onto == "dequantized" else "dequantized")
        return lambda model: fill_weights(model, self.plan, other)

    def _describe(self, survivals: tuple[Survival, ...], verification: Verification | None) -> Merged:
        return Merged(
            source=self.source.name,
            output=str(self.final),
            size_bytes=self.plan.size_bytes,
            dtype=self.plan.dtype,
            onto=self.onto,
            n_merged=sum(not part.is_copy for part in self.plan.parts),
            n_copied=sum(part.is_copy for part in self.plan.parts),
            survivals=survivals,
            verification=verification,
        )

    def _write_records(self, folder: Path, merged: Merged) -> None:
        """Nothing; card and manifest are written, the manifest last."""
        recipe = self.source.recipe
        manifest = {
            **describe_origin(self.source, "merge"),
            "adapter_sha256": hash_file(next(self.source.adapter.glob("adapter_model.*"))),
            **{key: value for key, value in merged.to_json().items() if key in ("dtype", "onto", "delta", "modules")},
            "verify": merged.verification.to_json() if merged.verification else None,
        }
        datasets = [Path(section.path).name for section in recipe.datasets] if recipe else []
        card = build_card(self.source.title, manifest, merged.verification, datasets=datasets)
        write_text(folder / "README.md", card)
        write_json(folder / MANIFEST, {**manifest, "files": describe_files(folder)})
