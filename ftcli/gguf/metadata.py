"""What a GGUF file says of its model: who made it, how it is sampled, and the numbers that its family has.

Name, version and the like are guessed from folder, config and model card by the package ``gguf``, which is llama.cpp's
own; the rest is in the order of its converter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftcli.errors import ContentError
from ftcli.gguf.family import FILE_TYPE, Config, Family
from ftcli.gguf.write import Int32, Value
from ftcli.store.file import read_json

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION in ggml.h


def read_model_config(folder: Path) -> dict[str, Any]:
    """The config in ``folder`` with its family's defaults.

    Raises:
        ContentError: transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ContentError("the config cannot be read", where=str(folder / "config.json"), why=reason) from error
    document: dict[str, Any] = config.to_dict()
    return document


def build_keys(
    folder: Path, family: Family, config: Config, *, file_type: int, n_parameters: int, name: str | None = None
) -> dict[str, Value]:
    """Key → value of all but the vocabulary, in the converter's order.

    Args:
        folder: of config, generation config and model card.
        family: the model's.
        config: as `read_model_config` gives it.
        file_type: llama.cpp's number of what most weights are.
        n_parameters: for the size in words, such as 135M.
        name: of the model; None guesses it.
    """
    keys: dict[str, Value] = {"general.architecture": family.architecture}
    keys |= {f"{family.architecture}.{key}": value for key, value in family.list_first(config)}
    keys["general.type"] = "model"
    keys |= _describe_model(folder, n_parameters, name)
    for key, value in family.list_keys(config):
        if key == FILE_TYPE:
            keys[key] = file_type
        else:
            keys[f"{family.architecture}.{key}"] = value
    keys["general.quantization_version"] = QUANTIZATION_VERSION
    return keys


def build_adapter_keys(folder: Path, family: Family, *, n_parameters: int) -> dict[str, Value]:
    """Key → value of a LoRA's file, in the order of llama.cpp's own converter of adapters.

    Args:
        folder: of the adapter's model card and generation config; its name is the adapter's.
        family: the base's.
        n_parameters: of the weights that the file says how to change.
    """
    keys: dict[str, Value] = {"general.architecture": family.architecture}
    keys |= {"general.type": "adapter", "adapter.type": "lora"}
    keys |= _describe_model(folder, -n_parameters, None)  # less than nothing: what is no model has no size
    keys["adapter.lora.alpha"] = 0.0
    keys["general.quantization_version"] = QUANTIZATION_VERSION
    return keys


def _describe_model(folder: Path, n_parameters: int, name: str | None) -> dict[str, Value]:
    """Sampling and authorship."""
    import gguf

    metadata = gguf.Metadata.load(None, folder, name, n_parameters)
    metadata.name = metadata.name or folder.name
    if metadata.size_label is None and n_parameters > 0:
        metadata.size_label = gguf.size_label(n_parameters, n_parameters, 0, 0)
    sampling = read_json(folder / "generation_config.json") or {}
    metadata.sampling_penalty_repeat = sampling.get("penalty_repeat", sampling.get("repetition_penalty"))
    writer = gguf.GGUFWriter(None, "")
    metadata.set_gguf_meta_model(writer)
    keys: dict[str, Value] = {}
    for key, entry in writer.kv_data[0].items():
        if entry.type == gguf.GGUFValueType.INT32:
            keys[key] = Int32(entry.value)
        else:
            keys[key] = float(entry.value) if entry.type == gguf.GGUFValueType.FLOAT32 else entry.value
    return keys
