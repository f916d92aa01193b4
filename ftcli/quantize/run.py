"""``ftcli quantize``: a run, an adapter or a model in fewer bits, in a folder that loaders read.

    target ─▶ found, checked ─▶ Quantizing (in a staging folder) ─▶ final name

What can be wrong with packages, layers, rows, disk and memory is found before the first weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ftcli.errors import UsageError
from ftcli.evaluate.target import Target, find_target
from ftcli.events import OnEvent, Saved, Stage, ignore_event
from ftcli.merge.source import build_source
from ftcli.quantize.method import Spec, check_package
from ftcli.quantize.work import SCRATCH, Quantized, Quantizing
from ftcli.store.file import bring_back, make_folder, staged_folder
from ftcli.store.output import check_outside, check_replaceable, read_output
from ftcli.store.run import find_owner, locked, read_manifest, update_manifest


def quantize(
    target: str | None,
    spec: Spec,
    *,
    base: str | None = None,
    calibration: str | None = None,
    output: Path | None = None,
    data: str | None = None,
    verifies: bool = True,
    overwrite: bool = False,
    on_event: OnEvent = ignore_event,
) -> Quantized:
    """The model of ``target`` in fewer bits, in a folder of its own.

    Args:
        target: a run, an adapter, or a model (folder or Hub id); None is the newest finished run.
        spec: the method and its options, as `ftcli.quantize.method.build_spec` gives them.
        base: the base model of a run or adapter, where it lies elsewhere than that says.
        calibration: rows that rounding is fitted to (a file, or a recipe), instead of those the run was trained on.
        output: the folder; by default ``quantized-METHOD/`` of the run, or ``./NAME-quantized-METHOD``.
        data: rows to compare on, instead of those of the run.
        verifies: whether the result is held against its source.
        overwrite: replace what was quantised there before.
        on_event: told of stages and progress.

    Raises:
        FtcliError: with the exit code of what happened; nothing stands under the final name then. A result that
            failed its verification is there: its ``verification`` says so.
    """
    check_package(spec.method)
    found = open_source(target, base)
    final = read_output(output) if output else name_output(found, spec)
    bring_back(final)
    check_output(final, found, overwrite=overwrite)
    on_event(Stage("check", f"{found.name} and {found.files.reference}" if found.adapter else found.name))
    with publishing(found, final, overwrite=overwrite) as folder:
        scratch = folder / SCRATCH
        make_folder(scratch)
        work = Quantizing(found, final, scratch, on_event)
        plan = work.plan(spec)
        rows = work.calibrate(spec, calibration)
        documents = work.load_rows(data, calibration) if verifies else []
        work.check_room(plan, rows, documents)
        expected = work.expect(documents)
        work.make(plan, rows, folder)
        made = work.finish(plan, rows, expected, folder, final, verifies=verifies)
    record_result(found, final, made)
    on_event(Saved(str(final)))
    return made


@contextmanager
def publishing(target: Target, final: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder that becomes ``final`` when the block ends without an error; a run that it lies in is locked.

    Raises:
        UsageError: something came there meanwhile.
        DiskError: the disk is full or may not be written, or another process works in the run.
    """
    run = find_owner(target.run, final)
    with locked(run) if run else nullcontext(), staged_folder(final) as folder:
        yield folder
        check_output(final, target, overwrite=overwrite)


def record_result(target: Target, final: Path, made: Quantized) -> None:
    """Nothing; a run in whose folder the result lies tells of it in its manifest."""
    if run := find_owner(target.run, final):
        entry = made.verification.to_json() if made.verification else None
        update_manifest(run, verify={**(read_manifest(run).get("verify") or {}), final.name: entry})


def open_source(target: str | None, base: str | None) -> Target:
    """What is quantised, found and checked.

    Raises:
        UsageError: no such target, or a GGUF file.
        ContentError: it is damaged.
    """
    found = find_target(target, base=base)
    if found.adapter:
        return build_source(found)
    if found.files.gguf_file:
        hint = "name the model's folder or run; another GGUF type of it: ftcli export"
        raise UsageError("is a GGUF file, which is not quantised to this", where=found.name, hint=hint)
    return found


def name_output(target: Target, spec: Spec) -> Path:
    """The folder that the result becomes where none is asked for."""
    name = f"quantized-{spec.method.name}"
    return target.run.path / name if target.run else Path(f"{target.title}-{name}")


def check_output(final: Path, target: Target, *, overwrite: bool) -> None:
    """None if the result may be written to ``final``.

    Raises:
        UsageError: something is there, or what is read lies in it.
    """
    check_outside(final, filter(None, (target.adapter, target.files.folder)), "quantised")
    check_replaceable(
        final,
        overwrite=overwrite,
        is_own=lambda manifest: manifest.get("command") == "quantize",
        otherwise="is no quantised model of ftcli",
    )
