"""The ways in which weights are quantised: what each needs, who loads its folder, and what it may lose."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from ftcli.errors import UsageError
from ftcli.evaluate.verdict import bound_kl

DEFAULT_SAMPLES, DEFAULT_SEQ_LEN = 128, 2048
_EXTRA = 'pip install "ftcli[quantize]"'


@dataclass(frozen=True)
class Method:
    """A way to quantise, by the name that ``--method`` has for it.

    ``bits`` are those that it can round to, the usual number first. ``is_fitted`` says whether it reads rows to fit its
    rounding to, and ``tune`` how many steps it usually learns that in; ``package`` is the one that does the work;
    ``loaders`` are who loads the folder, with what is installed for it.
    """

    name: str
    title: str
    bits: tuple[int, ...]
    is_fitted: bool
    tune: int
    package: str
    loaders: tuple[tuple[str, str], ...]


_PACKED_LOADERS = (
    ("vLLM", "pip install vllm"),
    ("SGLang", "pip install sglang"),
    ("transformers on a GPU", "pip install transformers gptqmodel"),
    ("transformers, dequantised by ftcli", "ftcli chat DIR"),
)
_BNB_LOADERS = (
    ("transformers", "pip install transformers accelerate bitsandbytes"),
    ("PEFT, to train LoRA on it", "pip install peft transformers accelerate bitsandbytes"),
    ("vLLM", "pip install vllm bitsandbytes"),
)
METHODS = {
    "gptq": Method("gptq", "GPTQ", (4, 8, 2), True, 50, "auto_round", _PACKED_LOADERS),
    "awq": Method("awq", "AWQ", (4,), True, 50, "auto_round", _PACKED_LOADERS),
    "nf4": Method("nf4", "NF4", (4,), False, 0, "bitsandbytes", _BNB_LOADERS),
    "int8": Method("int8", "LLM.int8", (8,), False, 0, "bitsandbytes", _BNB_LOADERS[:1] + _BNB_LOADERS[2:]),
}

# What may be lost, by bits: a share of the source's own loss, as rows that a model knows little of lose more, and the
# least in nats per trained token. The smaller a model, the more it loses, and these are for small ones.
_SHARES, _FLOORS = {2: 0.8, 4: 0.25, 8: 0.04}, {2: 0.5, 4: 0.1, 8: 0.02}
# How far what a block adds may be from what it added, relative to that: beyond 1 it is noise.
_BLOCK_ERRORS = {2: 3.0, 4: 1.0, 8: 0.5}


@dataclass(frozen=True)
class Spec:
    """What is asked for: ``group_size`` None is the largest usual one that fits, ``tune`` the steps of rounding that is
    learned, 0 for none. ``samples`` windows of ``seq_len`` tokens are what rounding is fitted to, None is as long as is
    usual and the model can look at.
    """

    method: Method
    bits: int
    group_size: int | None = None
    tune: int = 0
    samples: int = DEFAULT_SAMPLES
    seq_len: int | None = None

    @property
    def title(self) -> str:
        """``GPTQ, 4 bits``."""
        return f"{self.method.title}, {self.bits} bits"


def build_spec(
    name: str,
    *,
    bits: int | None = None,
    group_size: str = "auto",
    tune: int | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
) -> Spec:
    """What these options ask for; None is what is usual.

    Raises:
        UsageError: there is no such method, or it does not take an option.
    """
    method = METHODS.get(name.strip().lower())
    if method is None:
        hint = f"choose one of {', '.join(METHODS)}; for GGUF: ftcli export --gguf q4_k_m"
        raise UsageError("there is no such method", where=f"--method {name}", hint=hint)
    if bits is not None and bits not in method.bits:
        *first, last = map(str, sorted(method.bits))
        known = f"{', '.join(first)} or {last}" if first else last
        others = [other for other, found in METHODS.items() if bits in found.bits]
        hint = f"for {bits} bits: --method {others[0]}" if others else f"leave --bits out, or name {known}"
        raise UsageError(f"{method.name} rounds to {known} bits", where=f"--bits {bits}", hint=hint)
    options = {"--tune": tune, "--samples": samples, "--seq-len": seq_len}
    given = [option for option, value in options.items() if value is not None]
    if group_size != "auto":
        given.insert(0, "--group-size")
    if given and not method.is_fitted:
        why = f"{method.name} reads no rows and has blocks of its own"
        raise UsageError(why, where=given[0], hint=f"leave {' and '.join(given)} out, or take gptq or awq")
    return Spec(
        method,
        bits or method.bits[0],
        read_group_size(group_size),
        method.tune if tune is None else tune,
        samples or DEFAULT_SAMPLES,
        seq_len,
    )


def read_group_size(text: str) -> int | None:
    """The number in ``text``; None for ``auto``.

    Raises:
        UsageError: it is neither.
    """
    if text.strip().lower() == "auto":
        return None
    if not text.strip().isdecimal() or not int(text):
        raise UsageError("is no group size", where=f"--group-size {text}", hint="name auto, 128, 64 or 32")
    return int(text)


def check_package(method: Method) -> None:
    """None if the package that this method needs is installed.

    Raises:
        UsageError: naming the command to install it.
    """
    if importlib.util.find_spec(method.package) is None:
        name = method.package.replace("_", "-")
        hint = f"run: {_EXTRA}" if method.package == "auto_round" else f"run: pip install {name}"
        raise UsageError(f"{method.name} needs the package {name}", where=f"--method {method.name}", hint=hint)


def find_limit(spec: Spec, loss_source: float, kl_base: float | None = None, *, is_4bit: bool = False) -> float:
    """The most nats per trained token that a result may be away from its source.

    Args:
        spec: of the result; one of 8 bits may not be away by more than a share of what the fine-tuning did.
        loss_source: the source's own, in nats per trained token.
        kl_base: how far that moved the model, None if it is not known.
        is_4bit: whether it was trained on a base in 4 bits, and the original weights were quantised: the result may
            then be away besides by as much as a merge may.
    """
    limit = max(_FLOORS[spec.bits], _SHARES[spec.bits] * loss_source)
    if spec.bits == 8:
        limit = bound_kl(kl_base, floor=limit / 2, ceiling=limit)
    return limit + (bound_kl(kl_base) if is_4bit else 0.0)


def find_block_limit(spec: Spec) -> float:
    """The most that a block's error may be, as `ftcli.evaluate.block` finds it."""
    return _BLOCK_ERRORS[spec.bits]
