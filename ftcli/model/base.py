"""The base model in memory: 16-bit, 32-bit or packed by bitsandbytes, from a transformers folder or a GGUF file.

Every base takes one of two ways through transformers' own loader, or is unpacked here (GPTQ, AWQ), and is then
checked: no weight may be missing, left over or of another shape, and only ``Linear4bit`` modules are ever 4-bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ftcli.errors import ContentError, FtcliError, UsageError, is_memory_error
from ftcli.model.packed import build_empty, check_bitsandbytes, fill_model, plan_packed
from ftcli.model.quantization import Packing, build_quantization, read_packing, refuse_twice
from ftcli.recipe import ModelSection, QuantizationSection
from ftcli.store.gguf_header import read_gguf_header
from ftcli.store.target import ModelFiles

# Families whose GGUF tensors are known to come back as the weights they were made from.
GGUF_FAMILIES = ("llama", "qwen2", "qwen3")


def choose_device() -> torch.device:
    """CUDA's current device where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that ``model.dtype`` means: ``auto`` is bfloat16 where the device computes in it.

    Else it is float16 on CUDA (compute capability below 8.0), and float32 on a CPU without the instructions that
    oneDNN needs (AVX512 on x86), where products in bfloat16 take ten times as long.
    """
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.bfloat16 if has_cpu_bf16() else torch.float32


def name_dtype(model: ModelSection) -> str:
    """What the model of this section computes in here, as configs spell it."""
    return str(choose_dtype(model.dtype, choose_device())).removeprefix("torch.")


def join_stops(eos: int | list[int] | None, ends: Iterable[int]) -> int | list[int] | None:
    """A generation config's ``eos_token_id`` with every one of ``ends`` in it: an id, several, or None for none."""
    known = [] if eos is None else list(eos) if isinstance(eos, list) else [eos]
    joined = list(dict.fromkeys([*known, *ends]))
    return joined[0] if len(joined) == 1 else joined or None


def has_cpu_bf16() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 with instructions of its own."""
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(probe and probe())


def build_skeleton(files: ModelFiles, model: ModelSection) -> nn.Module:
    """The model without weights (on the meta device), to check names against before anything is loaded.

    Raises:
        ContentError: a family that transformers does not know, or a mixture of experts.
        UsageError: the model needs Python code of its own and the recipe does not allow that.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_gguf(files)
    options = {"gguf_file": files.gguf_file} if files.gguf_file else {}
    try:
        config = AutoConfig.from_pretrained(
            str(files.folder), trust_remote_code=model.trust_remote_code, local_files_only=True, **options
        )
        _check_experts(config, files)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    except FtcliError:
        raise
    except Exception as error:  # whatever a config of nonsense makes of transformers' code
        if is_memory_error(error):
            raise
        raise _explain_load_error(error, files) from error
    return skeleton  # type: ignore[no-any-return]


def load_model(
    files: ModelFiles,
    model: ModelSection,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: QuantizationSection | None = None,
    is_sharded: bool = False,
) -> Any:
    """The base model with its weights, on ``device``, in ``dtype`` (or NF4 with all else in ``dtype``).

    ``is_sharded``: it will be divided over processes.

    What a folder holds in GPTQ or AWQ is dequantised; what bitsandbytes packed stays so.

    Raises:
        ContentError: weights are missing, left over, of another shape, or not finite; packed in a way that is not
            known; or packed already where ``quantization`` asks for it.
        UsageError: the attention implementation is not available.
    """
    packing = read_packing(files)
    if packing and quantization:
        raise refuse_twice(packing, files.reference)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model.trust_remote_code}
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    config = build_quantization(quantization, dtype, is_sharded=is_sharded) if quantization else None
    try:
        if files.gguf_file:
            loaded, info = _load_gguf(files, options, device, config)
        elif packing and packing.is_unpacked_here:
            loaded, info = _load_packed(files, options, device, packing)
        else:
            loaded, info = _load_folder(files, options, device, config, packing)
    except FtcliError:
        raise
    except Exception as error:  # whatever files of nonsense make of transformers' and bitsandbytes' code
        if is_memory_error(error):
            raise
        raise _explain_load_error(error, files) from error
    _check_loading(files, loaded, info)
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes repacks NF4 weights on the first forward without gradients, for inference only:
            # gradients afterwards are silently wrong, and what is saved then too
            module.support_avx512bf16_for_cpu = False
    loaded.config.use_cache = False
    if quantization or (packing and not packing.is_unpacked_here):  # lies there; transformers would not have it moved
        check_bitsandbytes(loaded, files)
        return loaded
    return loaded.to(device)


def count_embedding_rows(model: Any) -> int:
    """Rows of the input embedding, which may be more than the tokenizer has entries."""
    return int(model.get_input_embeddings().weight.shape[0])


def _load_packed(
    files: ModelFiles, options: dict[str, Any], device: torch.device, packing: Packing
) -> tuple[Any, dict[str, Any]]:
    """An ordinary model, of the same config without its packing, with what the packed weights stand for."""
    from transformers import AutoConfig

    trust = options["trust_remote_code"]
    config = AutoConfig.from_pretrained(str(files.folder), trust_remote_code=trust, local_files_only=True)
    del config.quantization_config
    loaded = build_empty(files.folder, config, options)
    plan = plan_packed(files, packing, loaded)
    _check_loading(files, loaded, plan.info)
    fill_model(loaded, plan, device)
    return loaded, {}


def _load_folder(
    files: ModelFiles,
    options: dict[str, Any],
    device: torch.device,
    quantization: Any,
    packing: Packing | None,
) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    if quantization:
        options["quantization_config"] = quantization
    if quantization or packing:
        options["device_map"] = {"": device}
    loaded, info = AutoModelForCausalLM.from_pretrained(
        str(files.folder), local_files_only=True, output_loading_info=True, **options
    )
    return loaded, info


def _load_gguf(
    files: ModelFiles, options: dict[str, Any], device: torch.device, quantization: Any
) -> tuple[Any, dict[str, Any]]:
    """Dequantised by transformers, then as an ordinary state dict into a fresh model of the same config.

    A model that came straight from a GGUF file cannot be saved or quantised.
    """
    import transformers

    # transformers 5.18 keeps GGUF tensors packed unless it is told otherwise
    config_class = getattr(transformers, "GgufConfig", None)
    packed = {"quantization_config": config_class(dequantize=True)} if config_class else {}
    dense, info = transformers.AutoModelForCausalLM.from_pretrained(
        str(files.folder),
        gguf_file=files.gguf_file,
        local_files_only=True,
        output_loading_info=True,
        **options,
        **packed,
    )
    config = clean_config(dense.config)
    weights = dense.state_dict()
    if quantization:
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    options.pop("trust_remote_code")
    loaded, second = type(dense).from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True, **options
    )
    loaded.generation_config = dense.generation_config
    info["missing_keys"] = [*info["missing_keys"], *second["missing_keys"]]
    return loaded, info


def clean_config(config: Any) -> Any:
    """The config as its own family writes it: no trace of GGUF, floats as they were before float32."""
    values = config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "pretraining_tp", "unk_token_id"):
        values.pop(key, None)
    return type(config).from_dict({key: _shorten_float(value) for key, value in values.items()})


def _shorten_float(value: Any) -> Any:
    """9.999999747378752e-06 → 1e-05: the shortest decimal that is the same float32."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    return {k: _shorten_float(v) for k, v in value.items()} if isinstance(value, dict) else value


def check_gguf(files: ModelFiles) -> None:
    """Nothing; a GGUF file comes back as the transformers model that it was made from.

    Raises:
        ContentError: it is of a family, or has a trait, for which that is not known.
    """
    if not (path := files.gguf_path):
        return
    header = read_gguf_header(path)
    if header.architecture not in GGUF_FAMILIES:
        raise ContentError(
            f"GGUF files of the family {header.architecture or 'unknown'!r} cannot be dequantised yet",
            where=files.reference,
            hint=f"use the model's transformers folder; GGUF works for {', '.join(GGUF_FAMILIES)}",
        )
    if any(tensor.name == "rope_freqs.weight" for tensor in header.tensors):
        raise ContentError(
            "this GGUF file stretches its positions (rope_freqs), which cannot be restored",
            where=files.reference,
            hint="use the model's transformers folder",
        )


def _check_experts(config: Any, files: ModelFiles) -> None:
    for key in ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"):
        if getattr(config, key, None):
            raise ContentError(
                f"{config.model_type} is a mixture of experts, which ftcli does not train",
                where=files.reference,
                why="its experts are no linear modules: NF4 and LoRA would silently miss or misplace them",
                hint="choose a dense model",
            )


def _check_loading(files: ModelFiles, model: Any, info: Mapping[str, Any]) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(set(info.get("missing_keys", ())) - tied)
    unexpected = sorted(key for key in info.get("unexpected_keys", ()) if "rotary_emb.inv_freq" not in key)
    mismatched = sorted(str(key) for key in info.get("mismatched_keys", ()))
    mistyped = sorted(info.get("mistyped_keys", ()))
    kinds = {"missing": missing, "left over": unexpected, "of another shape": mismatched, "of another type": mistyped}
    for kind, keys in kinds.items():
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ContentError(
                f"{len(keys)} weights are {kind}: {shown}",
                where=files.reference,
                why="the files are not the whole model that config.json describes",
                hint="download or copy the model again",
            )


def _explain_load_error(error: Exception, files: ModelFiles) -> ContentError | UsageError:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return UsageError(
            "the model brings Python code of its own",
            where=files.reference,
            hint="read that code, then set model.trust_remote_code: true",
        )
    if isinstance(error, ImportError):
        return UsageError(text, where=files.reference, hint="install the package, or change attn_implementation")
    return ContentError("the model cannot be loaded", where=files.reference, why=text)
