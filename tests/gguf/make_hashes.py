"""Writes hashes.json anew: what llama.cpp's own converter makes of the models in gguf_models.py.

    python tests/gguf/make_hashes.py PATH/llama.cpp [MODEL ...]

PATH/llama.cpp holds convert_hf_to_gguf.py and gguf-py, as the source distribution of llama-cpp-python vendors them; the
package sentencepiece must be installed. Hashes that are there were made with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gguf_models import CASES, NAMES, write_model

KINDS = ("f32", "f16", "bf16")
# tokenizers that are made up, and what the converter, which knows them by a hash, would call the real ones
FORCED = {"mistral-nemo": "tekken", "smollm2": "smollm"}
START = """
import runpy, sys
import conversion.base
name = sys.argv[1]
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: name
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main(converter: Path, *cases: str) -> None:
    """Nothing; ``hashes.json`` beside this file holds new hashes of ``cases``, or of all."""
    path = Path(__file__).with_name("hashes.json")
    hashes: dict[str, dict[str, str]] = json.loads(path.read_text())
    places = [str(converter), str(converter / "gguf-py"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    script = str(converter / "convert_hf_to_gguf.py")
    for case in cases or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_model(Path(scratch) / case, case)
            start = ["-c", START, FORCED[case], script] if case in FORCED else [script]
            hashes[case] = {}
            for kind in KINDS:
                output = Path(scratch) / f"{kind}.gguf"
                options = [str(folder), "--outtype", kind, "--outfile", str(output)]
                options += ["--model-name", NAMES[case]] if case in NAMES else []
                subprocess.run([sys.executable, *start, *options], check=True, capture_output=True, env=environment)
                hashes[case][kind] = hashlib.sha256(output.read_bytes()).hexdigest()
                output.unlink()
    path.write_text(json.dumps(hashes, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
