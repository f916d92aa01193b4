"""Writes quantized.json anew: what llama.cpp's ``llama_model_quantize`` makes of the models in gguf_models.py.

    python tests/gguf/make_quantized.py

The package cyllama must be installed, whose ``model_quantize`` is that function. It is given the f32 file that ftcli
writes, which hashes.json shows to be the converter's. Hashes that are there were made with cyllama 0.2.18. Where
llama.cpp refuses a kind, there is none.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize
from gguf_models import QUANTIZED, convert_model, write_model

from ftcli.gguf.draft import KINDS


def main() -> None:
    """Nothing; ``quantized.json`` lies beside this file."""
    hashes: dict[str, dict[str, str]] = {}
    for case, changes in QUANTIZED.items():
        hashes[case] = {}
        with tempfile.TemporaryDirectory() as scratch:
            source, output = Path(scratch) / "source.gguf", Path(scratch) / "output.gguf"
            convert_model(write_model(Path(scratch) / "model", "smollm2", **changes), source, kind="f32")
            for kind in list(KINDS)[3:]:
                params = LlamaModelQuantizeParams()
                params.ftype, params.nthread = KINDS[kind], 1
                try:
                    model_quantize(str(source), str(output), params)
                except RuntimeError:
                    continue
                hashes[case][kind] = hashlib.sha256(output.read_bytes()).hexdigest()
    Path(__file__).with_name("quantized.json").write_text(json.dumps(hashes, indent=2) + "\n")


if __name__ == "__main__":
    main()
