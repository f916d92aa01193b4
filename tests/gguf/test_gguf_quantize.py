"""Quantised GGUF files against llama.cpp's ``llama_model_quantize`` (pinned hashes), and how they are made."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import QUANTIZED, convert_model, write_model

from ftcli.errors import ContentError, FtcliError, NumericError
from ftcli.evaluate.llama_library import LlamaModel, load_library
from ftcli.events import Progress
from ftcli.gguf.ahead import run_ahead
from ftcli.gguf.draft import KINDS
from ftcli.gguf.encode import encode_block
from ftcli.gguf.kquant import SCALES
from ftcli.gguf.native import find_packer
from ftcli.merge.stream import ModelStream, StreamTensor, open_folder
from ftcli.model.anatomy import describe_model
from ftcli.model.dimensions import read_dimensions
from ftcli.model.precision import GGUF_MIXTURES
from ftcli.store.gguf_header import read_gguf_header

HASHES = json.loads(Path(__file__).with_name("quantized.json").read_text())
QUICK = {"wide": set(KINDS), "narrow": set(KINDS)} | {case: set() for case in HASHES if case.startswith("80 layers,")}
FEW = {"q4_k_m", "q2_k"}


def has_llama() -> bool:
    try:
        return bool(load_library())
    except FtcliError:
        return False


@pytest.fixture(scope="module")
def open_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the folder of a case."""
    return cache(lambda case: write_model(tmp_path_factory.mktemp("case") / "model", "smollm2", **QUANTIZED[case]))


@pytest.fixture(autouse=True)
def in_torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """ftcli's own code packs, also where llama.cpp's could."""
    if "natively" not in request.node.name:
        monkeypatch.setattr("ftcli.gguf.encode.find_packer", lambda kind: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU packs instead")
@pytest.mark.skipif(not has_llama(), reason="llama.cpp is not installed")
@pytest.mark.parametrize("kind", ["q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k"])
def test_file_is_the_same_natively(tmp_path: Path, open_case: Callable[[str], Path], kind: str) -> None:
    result = convert_model(open_case("wide"), tmp_path / "a.gguf", kind=kind)
    assert hashlib.sha256(result.path.read_bytes()).hexdigest() == HASHES["wide"][kind]
    assert find_packer(GGUF_MIXTURES[kind]) is not None


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, marks=[] if kind in QUICK.get(case, FEW) else pytest.mark.slow)
        for case, hashes in HASHES.items()
        for kind in hashes
    ],
)
def test_file_is_the_one_that_llama_quantize_writes(
    tmp_path: Path, open_case: Callable[[str], Path], case: str, kind: str
) -> None:
    result = convert_model(open_case(case), tmp_path / "a.gguf", kind=kind)
    assert hashlib.sha256(result.path.read_bytes()).hexdigest() == HASHES[case][kind]


@pytest.mark.parametrize("case", ["wide", "wide, untied", "narrow, odd", "80 layers", "phi3"])
def test_forecast_is_to_the_byte(tmp_path: Path, open_case: Callable[[str], Path], case: str) -> None:
    folder = open_case(case)
    forecast = describe_model(read_dimensions(json.loads((folder / "config.json").read_text()))).weigh_gguf()
    result = convert_model(folder, tmp_path / "a.gguf", kind="q3_k_m")
    header = read_gguf_header(result.path)
    data_bytes = result.size_bytes - header.data_offset
    assert data_bytes == forecast["q3_k_m"]
    types: Counter[str] = Counter()
    for tensor in header.tensors:
        types[tensor.dtype] += math.prod(tensor.shape)
    assert result.types == types
    assert result.bits_per_weight == pytest.approx(8 * data_bytes / result.n_parameters, rel=0.001)
    quantized = sum(n for name, n in types.items() if name != "F32") / result.n_parameters
    assert result.fallback == (0 if case in ("wide", "wide, untied", "phi3") else quantized)


def test_types_of_32_values_only_miss_the_row_of_the_head(tmp_path: Path, open_case: Callable[[str], Path]) -> None:
    results = {
        kind: convert_model(open_case("narrow"), tmp_path / "a.gguf", kind=kind) for kind in ("q8_0", "q4_0", "bf16")
    }
    head = results["q4_0"].types["Q8_0"]
    assert head == 272 * 64
    assert [result.fallback * result.n_parameters for result in results.values()] == [0, head, 0]
    assert results["q4_0"].types.keys() == {"F32", "Q8_0", "Q4_0"}


def test_rows_that_no_block_fits_are_f16(tmp_path: Path, open_case: Callable[[str], Path]) -> None:
    result = convert_model(
        open_case("narrow, odd"), tmp_path / "a.gguf", kind="q8_0"
    )  # which llama.cpp did not know in 2025
    assert result.types.keys() == {"F32", "Q8_0", "F16"}
    assert result.fallback == result.types["F16"] / result.n_parameters


@pytest.mark.parametrize("n_threads", [1, 5])
def test_bytes_do_not_depend_on_threads_and_blocks(
    tmp_path: Path, open_case: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, n_threads: int
) -> None:
    def cut(tensor: StreamTensor) -> StreamTensor:
        def make_blocks() -> Iterator[torch.Tensor]:
            for block in tensor.make_blocks():
                yield from torch.split(block, 40)

        return StreamTensor(tensor.name, tensor.shape, make_blocks)

    monkeypatch.setattr("ftcli.gguf.convert.count_threads", lambda: n_threads)
    monkeypatch.setattr("ftcli.gguf.draft._BLOCK_VALUES", 5000)
    before = torch.get_num_threads()
    source = open_folder(open_case("wide"))
    source = ModelStream(source.folder, tuple(map(cut, source.tensors)))
    events: list[Any] = []
    result = convert_model(source, tmp_path / "a.gguf", kind="q4_k_m", on_event=events.append)
    assert hashlib.sha256(result.path.read_bytes()).hexdigest() == HASHES["wide"]["q4_k_m"]
    assert torch.get_num_threads() == before
    done = [event for event in events if isinstance(event, Progress)]
    assert len(done) > 100
    assert done[-1].done == done[-1].total


@pytest.mark.parametrize("error", [ContentError, KeyboardInterrupt])
def test_pool_ends_with_what_stops_it(
    tmp_path: Path, open_case: Callable[[str], Path], error: type[BaseException]
) -> None:
    def spoil() -> Iterator[torch.Tensor]:
        yield torch.full((256, 256), float("nan"))

    def stop(event: Any) -> None:
        if error is KeyboardInterrupt and isinstance(event, Progress):
            raise KeyboardInterrupt

    source = open_folder(open_case("wide"))
    if error is ContentError:
        (at,) = (i for i, tensor in enumerate(source.tensors) if tensor.name.endswith("1.self_attn.o_proj.weight"))
        tensors = list(source.tensors)
        tensors[at] = StreamTensor(tensors[at].name, (256, 256), spoil)
        source = ModelStream(source.folder, tuple(tensors))
    before = torch.get_num_threads()
    with pytest.raises(error) as caught:
        convert_model(source, tmp_path / "a.gguf", kind="q4_k_m", on_event=stop)
    assert error is KeyboardInterrupt or "blk.1.attn_output.weight holds NaN" in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ftcli-ahead")]
    assert torch.get_num_threads() == before


def test_results_come_in_order_and_tasks_are_not_asked_for_too_early() -> None:
    asked = 0

    def list_tasks() -> Iterator[Callable[[], int]]:
        nonlocal asked
        for asked in range(20):
            yield partial(int, str(asked))

    for expected, result in enumerate(run_ahead(list_tasks(), 3)):
        assert result == expected
        assert asked <= expected + 3
    assert asked == 19


@pytest.mark.parametrize("dtype", SCALES)
def test_scale_that_overflows_is_an_error(dtype: str) -> None:
    rows = torch.linspace(-1, 1, 512).view(2, 256)
    assert len(encode_block(rows, dtype, "x")) == 512 // (256 if "K" in dtype else 32) * SCALES[dtype][0]
    with pytest.raises(NumericError, match=f"x is too large for {dtype}"):
        encode_block(rows * 1e9, dtype, "x")


@pytest.mark.skipif(not has_llama(), reason="llama.cpp is not installed")
@pytest.mark.parametrize(("kind", "least"), [("q8_0", 0.9995), ("q4_k_m", 0.95), ("q2_k", 0.7)])
def test_llama_cpp_computes_nearly_the_same(
    tmp_path: Path, open_case: Callable[[str], Path], kind: str, least: float
) -> None:
    logits = []
    for name in ("f32", kind):
        model = LlamaModel(
            convert_model(open_case("wide, untied"), tmp_path / f"{name}.gguf", kind=name).path, n_threads=1
        )
        model.clear(32)
        logits.append(torch.from_numpy(model.decode(list(range(5, 37)), list(range(32)))).flatten())
    assert least < torch.corrcoef(torch.stack(logits))[0, 1] < 1
