"""How threads wait for each other in the commands that run llama.cpp."""

from __future__ import annotations

import os

_SPINS = "1000"  # of some nanoseconds


def share_processor() -> None:
    """Nothing; OpenMP's threads, torch's and llama.cpp's, sleep where they would wait long; to be called before torch.

    By default they spin, which takes the processor from whoever they wait for as soon as anything else runs: llama.cpp
    took three times as long and four times the processor's seconds then, and on an idle machine a quarter more.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
