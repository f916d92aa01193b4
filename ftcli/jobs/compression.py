"""``ftcli quantize --compare``: one model in several forms on the same rows, and the best that fits is kept.

target ─▶ each method's folder, each type's GGUF file (in a scratch folder) ─▶ Scoreboard ─▶ the one that is kept
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftcli.errors import UsageError
from ftcli.evaluate.target import Target
from ftcli.events import Event, Notice, OnEvent, Saved, Stage, ignore_event
from ftcli.gguf.convert import convert
from ftcli.gguf.draft import KINDS, Draft, draft_model
from ftcli.gguf.export import Exported, export
from ftcli.gguf.kind import find_kinds
from ftcli.gguf.output import find_output
from ftcli.gguf.vocabulary import find_training
from ftcli.jobs.contender import find_contender
from ftcli.jobs.entry import Measure, list_entries
from ftcli.jobs.evaluate import Scoreboard, Standing, evaluate_targets
from ftcli.quantize.calibration import Calibration, choose_rows
from ftcli.quantize.method import METHODS, Spec, build_spec, check_package
from ftcli.quantize.plan import Plan
from ftcli.quantize.run import check_output, name_output, open_source, publishing, record_result
from ftcli.quantize.work import Quantized, Quantizing
from ftcli.store.file import check_free, make_folder, scratch_folder
from ftcli.store.output import read_output

_MOST_ROWS = 256  # of each held-out set
Form = Spec | str  # a method with its options, or a type of GGUF file


@dataclass(frozen=True)
class Compared:
    """What came of it: the source comes first in ``scoreboard``, then the forms as they were named.

    ``kept`` names the one that was kept, ``made`` is that; both are None where none was to be.
    """

    source: str
    scoreboard: Scoreboard
    kept: str | None = None
    made: Quantized | Exported | None = None

    def to_json(self) -> dict[str, Any]:
        """The document of ``--json``."""
        made: dict[str, Any] = {}
        if isinstance(self.made, Quantized):
            made = self.made.to_json()
        elif self.made:
            file = self.made.files[0]
            made = {"output": str(file.path), "bytes": file.size_bytes, "verify": file.to_json()["verify"]}
        kept = {key: made.get(key) for key in ("output", "bytes", "verify")}
        return {"source": self.source, **self.scoreboard.to_json(), "kept": self.kept, **kept}


def find_forms(names: Sequence[str], build: Mapping[str, Any]) -> dict[str, Form]:
    """Name → form of each of ``names``; ``build`` are the options of the methods that rounding is fitted for.

    Raises:
        UsageError: one of them is neither a method nor a type of GGUF file; or none takes an option that is given.
    """
    forms: dict[str, Form] = {}
    for name in (name.strip().lower() for name in names):
        if not name:
            continue
        if name in METHODS:
            forms[name] = build_spec(name, **(build if METHODS[name].is_fitted else {}))
        elif name in KINDS:
            forms[find_kinds([name])[0]] = name
        else:
            hint = f"methods: {', '.join(METHODS)}; types of GGUF: {', '.join(KINDS)}"
            raise UsageError("is neither a method nor a type of GGUF file", where=f"--compare {name}", hint=hint)
    if not forms:
        raise UsageError("nothing is named", where="--compare", hint="name some: --compare nf4,int8,gptq,awq,q4_k_m")
    given = [f"--{name.replace('_', '-')}" for name, value in build.items() if value not in (None, "auto")]
    if given and not any(isinstance(form, Spec) and form.method.is_fitted for form in forms.values()):
        hint = f"leave {' and '.join(given)} out, or compare gptq or awq"
        raise UsageError("nothing that is compared takes this", where=given[0], hint=hint)
    return forms


def compare_forms(
    target: str | None,
    forms: Mapping[str, Form],
    *,
    chosen: str | None = None,
    most_bytes: int | None = None,
    calibration: str | None = None,
    data: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    on_event: OnEvent = ignore_event,
) -> Compared:
    """The scoreboard of ``forms`` of one model; one of them is kept if ``chosen`` or ``most_bytes`` say which.

    Args:
        target: a run, an adapter, or a model (folder or Hub id); None is the newest finished run.
        forms: name → form, as `find_forms` gives them.
        chosen: the one to keep.
        most_bytes: keeps the one that is the closest to the source, of those no larger than this.
        calibration: rows that rounding is fitted to, instead of those the run was trained on.
        data: rows to compare on, instead of what the run held out.
        output: the folder of what is kept.
        overwrite: replace what is there.
        on_event: told of stages and progress.

    Raises:
        FtcliError: with the exit code of what happened; before anything is made if it can be known by then.
    """
    if chosen is not None and chosen not in forms:
        raise UsageError("is not among those that are compared", where=chosen, hint=f"one of {', '.join(forms)}")
    for form in forms.values():
        if isinstance(form, Spec):
            check_package(form.method)
    found = open_source(target, None)
    on_event(Stage("check", found.name))
    keeps = chosen is not None or most_bytes is not None
    if keeps:
        _check_places(found, forms, chosen, output, overwrite=overwrite)
    # beside a run, not in it: what lies half-made in one is swept whenever it is locked
    folder = read_output(output).parent if output else found.run.path.parent if found.run else Path()
    place = folder / f"{found.title}-compared"
    with scratch_folder(place) as scratch:
        work = _Comparison(found, forms, scratch, on_event)
        wanted = work.plan_measure(data, calibration)
        work.prepare(calibration, most_bytes)
        board = work.measure(wanted)
        kept = work.choose(board, chosen, most_bytes) if keeps else None
        made = work.keep(kept, output, wanted.data, calibration, overwrite=overwrite) if kept else None
    return Compared(found.name, board, kept, made)


def read_size(text: str) -> int:
    """Bytes of ``5GB``: 10^9 each, and 2^30 of ``GiB``; MB and MiB likewise.

    Raises:
        UsageError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*([kmgt]?)(i?)b?\s*", text, flags=re.I | re.A)
    power = " kmgt".index(match[2].lower() or " ") if match else 0
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if not size:
        raise UsageError("is no size", where=f"--max-size {text}", hint="write it like 5GB")
    return size


def _check_places(
    target: Target, forms: Mapping[str, Form], chosen: str | None, output: Path | None, *, overwrite: bool
) -> None:
    """None if whichever form is kept may be written."""
    for name, form in forms.items():
        if chosen not in (None, name):
            continue
        if isinstance(form, Spec):
            check_output(read_output(output) if output else name_output(target, form), target, overwrite=overwrite)
        else:
            find_output(target, output, overwrites=overwrite).check([form])


class _Comparison:
    """All forms of one model in ``scratch``, one after another."""

    def __init__(self, target: Target, forms: Mapping[str, Form], scratch: Path, on_event: OnEvent) -> None:
        self.target, self.forms, self.scratch, self.on_event = target, forms, scratch, on_event
        self.work = Quantizing(target, scratch, scratch, on_event)
        self.plans: dict[str, Plan] = {}
        self.calibration: Calibration | None = None
        self.draft: Draft | None = None

    def prepare(self, calibration: str | None, most_bytes: int | None) -> None:
        """Nothing; every form is planned and found possible."""
        sizes: dict[str, int] = {}
        for name, form in self.forms.items():
            if isinstance(form, Spec):
                plan = self.plans[name] = self.work.plan(form)
                if form.method.is_fitted and self.calibration is None:
                    self.calibration = self.work.calibrate(form, calibration)
                self.work.check_room(plan, self._find_calibration(form), ())
                sizes[name] = plan.size_bytes
            else:
                sizes[name] = self._draft().measure_bytes(form)
        check_free(self.scratch, sum(sizes.values()))
        smallest = min(sizes, key=sizes.__getitem__)
        if most_bytes is not None and sizes[smallest] > most_bytes:
            what = f"none is as small: {smallest}, the smallest, takes {sizes[smallest] / 1e6:,.1f} MB"
            where = f"--max-size {most_bytes / 1e6:,.1f} MB"
            raise UsageError(what, where=where, hint="compare smaller ones: q3_k_m, q2_k")

    def plan_measure(self, data: str | None, calibration: str | None) -> Measure:
        """What is measured: what the run held out with its own score, else ``data``, else what rounding is fitted to.

        Raises:
            FtcliError: there are no rows, or they cannot be read.
        """
        recipe, (_, data) = self.target.recipe, choose_rows(self.target, data, calibration, self.on_event)
        wanted = Measure(data=data, limit=_MOST_ROWS)
        if recipe and recipe.eval and recipe.eval.score and data is None:
            asked = recipe.eval
            wanted = replace(wanted, metric=asked.score, pattern=asked.regex)
            wanted = replace(wanted, max_new_tokens=asked.max_new_tokens, batch_rows=asked.per_device_eval_batch_size)
        wanted.check()
        list_entries([find_contender(self.target.name)], wanted, lambda notice: None)
        return wanted

    def measure(self, wanted: Measure) -> Scoreboard:
        """All forms are made, and stand after the source in what comes back, by their names."""
        paths = {name: self._make(name, form) for name, form in self.forms.items()}

        def rename(text: str) -> str:
            for name, path in paths.items():
                text = text.replace(str(path), name)
            return text

        def tell(event: Event) -> None:
            if isinstance(event, Stage):
                event = replace(event, detail=rename(event.detail))
            self.on_event(Notice(rename(event.text)) if isinstance(event, Notice) else event)

        board = evaluate_targets([self.target.name, *map(str, paths.values())], wanted, on_event=tell)
        first, *others = board.standings
        named = (replace(row, target=name) for row, name in zip(others, self.forms, strict=True))
        return replace(board, standings=(first, *named), notices=tuple(map(rename, board.notices)))

    def choose(self, board: Scoreboard, chosen: str | None, most_bytes: int | None) -> str | None:
        """The form to keep: ``chosen``, or of those that are small enough the closest to the source."""
        if chosen is not None or most_bytes is None:
            return chosen
        fitting = [row for row in board.standings[1:] if row.size_bytes <= most_bytes]
        if not fitting:
            self.on_event(Notice(f"none is as small as {most_bytes / 1e6:,.1f} MB, so none is kept"))
            return None
        return min(fitting, key=_rate).target

    def keep(
        self, name: str, output: Path | None, data: str | None, calibration: str | None, *, overwrite: bool
    ) -> Quantized | Exported:
        """The form under its final name, verified."""
        self.on_event(Stage("keep", name))
        form = self.forms[name]
        if not isinstance(form, Spec):
            return export(
                self.target.name, kinds=[form], output=output, data=data, overwrite=overwrite, on_event=self.on_event
            )
        final = read_output(output) if output else name_output(self.target, form)
        expected = self.work.expect(self.work.load_rows(data, calibration))
        with publishing(self.target, final, overwrite=overwrite) as folder:
            for path in sorted((self.scratch / name).iterdir()):
                shutil.move(path, folder / path.name)
            made = self.work.finish(self.plans[name], self._find_calibration(form), expected, folder, final)
        record_result(self.target, final, made)
        self.on_event(Saved(str(final)))
        return made

    def _make(self, name: str, form: Form) -> Path:
        """The folder or file of a form."""
        if not isinstance(form, Spec):
            self.on_event(Stage("gguf", name))
            path = self.scratch / f"{self.target.title}-{form.upper()}.gguf"
            return convert(self._draft(), path, kind=form, on_event=self.on_event).path
        folder = self.scratch / name
        make_folder(folder)
        plan, calibration = self.plans[name], self._find_calibration(form)
        self.work.make(plan, calibration, folder)
        self.work.finish(plan, calibration, "", folder, folder, verifies=False)
        return folder

    def _find_calibration(self, spec: Spec) -> Calibration | None:
        """The one of all methods that are fitted to rows; None for the others."""
        return self.calibration if spec.method.is_fitted else None

    def _draft(self) -> Draft:
        if self.draft is None:
            self.draft = draft_model(self.work.stream, name=self.target.title, training=find_training(self.target))
        return self.draft


def _rate(row: Standing) -> float:
    """How far it is from the source; where tokens are not the same, how bad by itself."""
    return row.loss if row.kl is None else row.kl
