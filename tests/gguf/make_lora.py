"""Writes lora.json anew: hashes of what llama.cpp's own converter makes of the adapters in gguf_models.py.

    python tests/gguf/make_lora.py PATH/llama.cpp

PATH/llama.cpp as for make_hashes.py. The adapters' alpha is their rank, so that the converter's scale is 1; before a
file is hashed, its alpha is set to 0, by which ftcli says the same. Hashes that are there were made with
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gguf_models import ADAPTED, write_adapter, write_model

ALPHA = b"adapter.lora.alpha" + struct.pack("<I", 6)  # the key, and GGUF's type of a float
NAME = "Tiny-chat-1B-v0.2-lora"


def main(converter: Path) -> None:
    """Nothing; ``lora.json`` beside this file holds the hash of each of `ADAPTED`."""
    places = [str(converter), str(converter / "gguf-py"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    hashes = {}
    for case, (changes, targets) in ADAPTED.items():
        with tempfile.TemporaryDirectory() as scratch:
            base, output = write_model(Path(scratch) / "base", "smollm2", **changes), Path(scratch) / "a.gguf"
            adapter = write_adapter(Path(scratch) / NAME, base, targets)
            words = ["--base", str(base), "--outfile", str(output), str(adapter)]
            script = str(converter / "convert_lora_to_gguf.py")
            subprocess.run([sys.executable, script, *words], check=True, capture_output=True, env=environment)
            data = output.read_bytes()
            place = data.index(ALPHA) + len(ALPHA)
            rank = struct.unpack_from("<f", data, place)[0]
            assert rank == 4
            hashes[case] = hashlib.sha256(data[:place] + bytes(4) + data[place + 4 :]).hexdigest()
    Path(__file__).with_name("lora.json").write_text(json.dumps(hashes, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
