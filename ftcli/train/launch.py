"""Several processes of one command: started here through torch's elastic launcher, or as commands for other machines.

The processes are told apart by RANK, WORLD_SIZE and MASTER_ADDR, which torchrun sets too (`world`).
"""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from ftcli.errors import UsageError
from ftcli.model.base import choose_device

_PORT = 29500  # torchrun's own default


def launch(words: Sequence[str], n_processes: int) -> int:
    """The exit code of ``ftcli`` with ``words``, run as so many processes on this machine.

    The first process that fails ends the others; its code is the result, 128 + n if signal n ended it. A signal
    that comes here is handed on, and the processes have half a minute to save (TORCH_ELASTIC_SHUTDOWN_TIMEOUT).

    Raises:
        UsageError: there are fewer CUDA devices.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check_devices(n_processes)
    if choose_device().type == "cpu":  # or each would take every core
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // n_processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes tell what went wrong
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "ftcli", *words)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        code = int(error.get_first_failure()[1].exitcode)
        return code if code > 0 else 128 - code
    return 0


def launch_config(words: Sequence[str], config: str) -> NoReturn:
    """Never returns: this process goes on as ``accelerate launch`` with ``config``, which starts ``ftcli``.

    Raises:
        UsageError: there is no such file.
    """
    if not Path(config).is_file():
        raise UsageError("no such file", where=config, hint="make one with: accelerate config --config_file FILE")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "-m", "ftcli", *words]
    os.execv(sys.executable, command)


def check_devices(n_processes: int) -> None:
    """None if every process of this machine has a device of its own.

    Raises:
        UsageError: there are fewer CUDA devices.
    """
    n_devices = torch.cuda.device_count()
    if choose_device().type == "cuda" and n_processes > n_devices:
        raise UsageError(
            f"{n_processes} processes need as many CUDA devices, and there are {n_devices}",
            where="--nproc",
            hint=f"set --nproc {n_devices}, or CUDA_VISIBLE_DEVICES= to train on the CPU",
        )


def list_commands(words: Sequence[str], n_nodes: int, n_processes: int) -> list[str]:
    """The command for each of ``n_nodes`` machines, this one first; each starts so many processes there."""
    place = ["--master-addr", socket.gethostname(), "--master-port", str(_PORT)]
    size = ["--nnodes", str(n_nodes), "--nproc-per-node", str(n_processes)]
    return [
        shlex.join(["torchrun", *size, "--node-rank", str(node), *place, "-m", "ftcli", *words])
        for node in range(n_nodes)
    ]
