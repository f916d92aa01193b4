"""The proof of a GGUF file: its tensors as planned, its vocabulary as trained, and its answers against its source's.

source ─▶ log-probabilities on disk ─▶ (freed) ─▶ each file in llama.cpp ─▶ ids of texts, then KL, top-1, loss
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.data.chat import ChatRenderer, Rendered
from ftcli.data.template import ChatTemplate
from ftcli.errors import ContentError, FtcliError, UsageError, explain, is_lack_of_memory
from ftcli.evaluate.compare import Recording, compare
from ftcli.evaluate.llama_library import load_library
from ftcli.evaluate.llamacpp import LlamaCppBackend, open_llama
from ftcli.evaluate.parity import TextReader, find_misread, list_probes, spell_documents
from ftcli.evaluate.subject import Backend, Subject, open_subject
from ftcli.evaluate.verdict import Verdict
from ftcli.events import Notice, OnEvent, Stage
from ftcli.gguf.kind import find_limit
from ftcli.gguf.reader import VocabularyReader
from ftcli.gguf.vocabulary import KNOWN_ENDS
from ftcli.gguf.write import OutputTensor
from ftcli.merge.verify import measure_options, record_subject
from ftcli.store.file import make_folder
from ftcli.store.gguf_header import GgufHeader, check_gguf_data
from ftcli.store.vocabulary import read_gguf_vocabulary

_MOST_TEXTS = 256
_MOST_MISREAD = 0.01  # of the rows


@dataclass(frozen=True)
class Verification:
    """What came of it: ``problem`` is what is wrong with the file itself, empty for a sound one.

    ``verdict`` is None where there were no rows, or nothing that runs the file; ``n_texts`` were read by the file's
    vocabulary and gave the tokenizer's ids, but for ``n_misread``.
    """

    verdict: Verdict | None = None
    problem: str = ""
    n_texts: int = 0
    n_misread: int = 0

    @property
    def has_passed(self) -> bool:
        """Whether the file may be used for its source, as far as that was measured."""
        return not self.problem and (self.verdict is None or self.verdict.has_passed)

    def to_json(self) -> dict[str, Any]:
        """The figures by the names of ``--json``, null where models were not compared."""
        names = ("kl", "most_kl", "kl_base", "top1", "ppl_source", "ppl_result", "n_tokens")
        figures: dict[str, Any] = dict.fromkeys(names)
        if self.verdict:
            found = self.verdict.to_json()
            figures = {key: found[key] for key in figures}
        texts = {"n_texts": self.n_texts, "n_misread": self.n_misread}
        return {**figures, **texts, "passed": self.has_passed, "problem": self.problem or None}


@dataclass(frozen=True)
class Expected:
    """What a file is held against.

    Args:
        tokenizer: the source's; None where the file has the vocabulary of another GGUF file.
        renderer: as the model was trained; None where it has no template.
        is_trained: whether it knows chats exactly as the template writes them.
        documents: what it is read and measured on; none without rows.
        recording: what the source says of them; None compares nothing.
        kl_base: how far its fine-tuning moved the model there, in nats per trained token; None if that is not known.
        is_4bit: whether its base was held in 4 bits, which the file does not.
    """

    tokenizer: Any
    renderer: ChatRenderer | None
    is_trained: bool = False
    documents: Sequence[Rendered] = ()
    recording: Recording | None = None
    kl_base: float | None = None
    is_4bit: bool = False


def record_source(
    open_source: Callable[[], Subject],
    documents: Sequence[Rendered],
    folder: Path,
    on_event: OnEvent,
    *,
    measures_base: bool,
) -> tuple[Recording, float | None]:
    """What the model says that ``open_source`` loads, and its distance from its base where it brings one.

    It lies in files of ``folder``, and the model is in memory only meanwhile.

    Raises:
        MemoryExhausted: it does not fit.
    """
    on_event(Stage("verify", "the source"))
    make_folder(folder)
    return record_subject(open_source(), documents, folder, on_event, measures_base=measures_base)


def verify_file(
    path: Path, kind: str, tensors: Sequence[OutputTensor], expected: Expected, on_event: OnEvent
) -> Verification:
    """What the file at ``path`` is worth.

    Args:
        path: the file.
        kind: of file, which says what it may lose.
        tensors: what it should hold.
        expected: of its source.
        on_event: told of stages and progress, and why nothing was compared.
    """
    on_event(Stage("verify", path.name))
    if problem := find_problem(path, tensors, expected):
        return Verification(problem=problem)
    try:
        return _run(path, kind, expected, on_event)
    except ContentError as error:
        return Verification(problem=explain(error))


def _run(path: Path, kind: str, expected: Expected, on_event: OnEvent) -> Verification:
    """What comes of reading texts, and of running the file on the rows.

    Raises:
        ContentError: llama.cpp refuses the file.
    """
    backend = _open_backend(path, expected, on_event)
    n_texts, n_misread, problem = _read_texts(path, backend, expected, on_event)
    unmeasured = Verification(None, problem, n_texts, n_misread)
    if problem or backend is None or expected.recording is None:
        return unmeasured
    try:
        found = compare(expected.recording, backend, expected.documents, **measure_options(on_event))
    except Exception as error:
        if not is_lack_of_memory(error):
            raise
        on_event(Notice(f"{path.name} is not compared with its source: {explain(error)}"))
        return unmeasured
    limit = find_limit(kind, expected.kl_base, is_4bit=expected.is_4bit)
    return Verification(Verdict(found, expected.kl_base, limit), "", n_texts, n_misread)


def find_problem(path: Path, tensors: Sequence[OutputTensor], expected: Expected) -> str:
    """What is not in the file at ``path`` as it should be; empty for nothing."""
    try:
        header = read_gguf_vocabulary(path)
        check_gguf_data(header, path.stat().st_size, path.name)
    except ContentError as error:
        return explain(error)
    found = {tensor.name: (tensor.shape, tensor.dtype) for tensor in header.tensors}
    wanted = {tensor.name: (tensor.shape, tensor.dtype) for tensor in tensors}
    if wrong := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
        return f"the tensor {wrong[0]} is not as it was to be written"
    return _find_wrong_end(header, expected) or _find_wrong_chat(header, expected)


def _find_wrong_end(header: GgufHeader, expected: Expected) -> str:
    """Where llama.cpp would not end an answer though a trained turn ends there; empty if it does."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    texts = dict(enumerate(tokens if isinstance(tokens, list) else ()))
    stops = [header.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot")]
    known = KNOWN_ENDS | {texts[stop] for stop in stops if isinstance(stop, int) and stop in texts}
    ends = _list_ends(expected.renderer)
    return f"llama.cpp would not end an answer at {ends[0]}" if ends and not known.intersection(ends) else ""


def _find_wrong_chat(header: GgufHeader, expected: Expected) -> str:
    """What is wrong if a runtime would write a chat otherwise than in training; empty for nothing.

    A chat begins with one BOS at most: llama.cpp takes away that of a template where it puts one there itself.
    """
    if expected.renderer is None or expected.tokenizer is None:
        return ""
    known, bos = expected.renderer.template, expected.tokenizer.bos_token
    written = known.render_question()
    if written is None:
        return ""
    if bos and written.startswith(bos * 2):
        return f"the template writes {bos} twice"
    if not expected.is_trained:
        return ""
    if bos and header.metadata.get("tokenizer.ggml.add_bos_token") and not written.startswith(bos):
        return f"llama.cpp would begin a chat with {bos}, and it was trained without"
    embedded = ChatTemplate(header.metadata.get("tokenizer.chat_template"), known.special_tokens, None, known.date)
    if (found := embedded.render_question()) is not None and found != written:
        return "the chat template in the file writes a chat otherwise than in training"
    return ""


def _open_backend(path: Path, expected: Expected, on_event: OnEvent) -> Backend | None:
    """The model of the file; None where nothing here runs it, or nothing is to be learned from that.

    Raises:
        ContentError: llama.cpp refuses the file.
    """
    has_library = _has_library()
    if expected.recording is None and not (has_library and expected.tokenizer):
        return None
    try:
        if has_library and expected.renderer:
            return LlamaCppBackend(open_llama(path, path.name), expected.renderer)
        return open_subject(str(path), renderer=expected.renderer, on_event=on_event).backend
    except Exception as error:
        if not (is_lack_of_memory(error) or (isinstance(error, FtcliError) and not has_library)):
            raise
        on_event(Notice(f"{path.name} is not compared with its source: {explain(error)}"))
    return None


def _read_texts(path: Path, backend: Backend | None, expected: Expected, on_event: OnEvent) -> tuple[int, int, str]:
    """How many texts were read, how many of them otherwise than in training, and what is wrong with that.

    llama.cpp reads them where it runs the file, else this reads its vocabulary.
    """
    if expected.tokenizer is None or expected.renderer is None:
        return 0, 0, ""
    reader: TextReader = backend.model if isinstance(backend, LlamaCppBackend) else VocabularyReader(path)
    probes = list_probes(expected.renderer)
    if misread := find_misread(reader, expected.tokenizer, probes):
        return len(probes), len(misread), f"llama.cpp would read texts otherwise: {misread[0].describe()}"
    rows = spell_documents(expected.tokenizer, expected.documents[:_MOST_TEXTS])
    misread = find_misread(reader, expected.tokenizer, rows)
    n_texts = len(probes) + len(rows)
    if not misread:
        return n_texts, 0, ""
    told = f"{len(misread)} of {len(rows)} rows are read otherwise by llama.cpp: {misread[0].describe()}"
    if len(misread) > _MOST_MISREAD * len(rows):
        return n_texts, len(misread), told
    on_event(Notice(told))
    return n_texts, len(misread), ""


def _list_ends(renderer: ChatRenderer | None) -> tuple[str, ...]:
    """The tokens that end a turn; none where there is no template, or one without an end."""
    try:
        return renderer.find_turn_ends() if renderer else ()
    except FtcliError:
        return ()


def _has_library() -> bool:
    try:
        load_library()
    except UsageError:
        return False
    return True
