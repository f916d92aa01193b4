"""The processes of one run: which of them this is, what they agree on, and which of them tells what went wrong.

    torchrun, accelerate launch, ftcli train --nproc     set RANK, WORLD_SIZE, MASTER_ADDR … for each process
    World.on_main(f)      f() in process 0 alone, its result everywhere: all that is read and written of the run folder
    World.add(values)     their sums over all processes
    World.agree(number)   the largest of all processes: a signal that one of them got

A run of one process is the same code in which nothing is sent. What is sent goes over gloo, on CUDA too: there a
process that has died is noticed at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from ftcli.errors import FtcliError, Interrupted, PeerFailed, UsageError, explain_stop
from ftcli.model.base import choose_device
from ftcli.train.stop import deaf, is_launched

T = TypeVar("T")

_LOSS_OF_PEER = ("by peer", "Broken pipe", "Connection refused", "NCCL", "unhandled system error", "gloo")
_FIRST_WORD_SECONDS = 1.0  # by which process 0 is the first to tell of what every process has met
_LONGEST_WAIT = timedelta(days=2)  # for process 0, which may read much data; one that died is noticed at once


@dataclass(frozen=True)
class World:
    """One process (``rank``, from 0) of ``size``; ``group`` is where they talk, None in a run of one."""

    rank: int = 0
    size: int = 1
    group: Any = None
    store: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def n_local(self) -> int:
        """How many of the processes are on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    def choose_device(self) -> torch.device:
        """The device that this process computes on: each of a machine has a GPU of its own."""
        device = choose_device()
        is_shared = device.type == "cuda" and self.size > 1
        return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_shared else device

    def on_main(self, function: Callable[[], T]) -> T:
        """What ``function`` gives in process 0, where alone it is called.

        Raises:
            Interrupted: a signal stopped it there.
            PeerFailed: it raised there; there the error itself is raised.
        """
        if self.size == 1:
            return function()
        sent: list[Any] = [None, None]
        caught: FtcliError | None = None
        if self.is_main:
            try:
                sent[0] = function()
            except FtcliError as error:
                caught, sent[1] = error, (error.what, error.exit_code, isinstance(error, Interrupted))
        distributed.broadcast_object_list(sent, src=0, group=self.group)
        if caught:
            raise caught
        if sent[1]:
            what, exit_code, is_stop = sent[1]
            raise Interrupted(what, signal_number=exit_code - 128) if is_stop else PeerFailed(what, exit_code=exit_code)
        result: T = sent[0]
        return result

    def add(self, values: Sequence[float]) -> list[float]:
        """The sums of ``values`` over all processes, in float64."""
        return self._reduce(values, "SUM")

    def agree(self, number: int) -> int:
        """The largest ``number`` of all processes."""
        return int(self._reduce([number], "MAX")[0])

    def _reduce(self, values: Sequence[float], operation: str) -> list[float]:
        if self.size == 1:
            return list(values)
        sent = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(sent, getattr(distributed.ReduceOp, operation), group=self.group)
        return sent.tolist()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """A block that process 0 has gone through before the others enter it, as when it fills a cache."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def wait(self) -> None:
        """Nothing; every process has come here."""
        if self.size > 1:
            distributed.barrier(group=self.group)

    def settle(self, error: Exception) -> Exception:
        """What this process has to say of ``error``: the error itself, or ``PeerFailed`` if another process tells it.

        What all processes have met is told by process 0; what one of them has met, by that one.
        """
        if self.size == 1:
            return error
        if isinstance(error, PeerFailed):  # when one process ends, the launcher ends all: that one must be done
            with suppress(KeyboardInterrupt):
                self._read_posted(_LONGEST_WAIT)
            return error
        with deaf():  # the launcher's signal may come any moment
            return self._tell_first(error)

    def _tell_first(self, error: Exception) -> Exception:
        if _is_loss_of_peer(error):
            if posted := self._read_posted(timedelta(seconds=2)):
                return posted
            error = FtcliError(
                "another process of this run is gone",
                why="it ended without a word; often the system ended it as memory ran out",
                hint="look at what the launcher and the system's log say",
            )
        code = error.exit_code if isinstance(error, FtcliError) else 1
        with suppress(Exception):  # process 0, which may keep the store, is gone
            self.store.set("failure", f"{code} {error}")
            if not self.is_main:
                time.sleep(_FIRST_WORD_SECONDS)
            if isinstance(error, FtcliError) and self.store.add("tellers", 1) > 1:
                return PeerFailed(str(error), exit_code=code)
        return error

    def _read_posted(self, patience: timedelta) -> PeerFailed | None:
        """What another process has said, or says within that time."""
        end = time.monotonic() + patience.total_seconds()
        with suppress(Exception):  # the process that keeps the store is gone
            while not self.store.check(["failure"]):
                if time.monotonic() > end:
                    return None
                time.sleep(0.05)
            code, _, text = self.store.get("failure").decode("utf-8", "replace").partition(" ")
            return PeerFailed(text, exit_code=int(code))
        return None


ALONE = World()


@contextmanager
def joined_world() -> Iterator[World]:
    """The world that this process belongs to, for as long as the block lasts.

    Raises:
        PeerFailed: something went wrong that another process tells.
        UsageError: the launcher did not say where the others are, or accelerate makes another number of them.
    """
    if not is_launched():
        yield World()
        return
    world = _join()
    try:
        yield world
    except KeyboardInterrupt as error:
        raise world.settle(explain_stop(error)) from None
    except Exception as error:
        settled = world.settle(error)
        if settled is error:
            raise
        raise settled from error
    finally:
        distributed.destroy_process_group()


def _join() -> World:
    from accelerate import PartialState
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    asked = int(os.environ["WORLD_SIZE"])
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true":
            hint = "set distributed.strategy: ddp or fsdp2, or change accelerate's config to MULTI_GPU or FSDP"
            raise UsageError(f"{engine} is no strategy of ftcli", where="distributed.strategy", hint=hint)
    try:
        # without cpu=True each would be a run of its own where there is no GPU
        state = PartialState(cpu=choose_device().type == "cpu")
        group = distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = PrefixStore("ftcli", TCPStore(address, port, is_master=False))
    except (KeyError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"WORLD_SIZE is {asked}, and the other processes were not found",
            why=str(error).partition("\n")[0],
            hint="start with ftcli train --nproc N, torchrun or accelerate launch; for one process unset WORLD_SIZE",
        ) from error
    if state.num_processes != asked:
        raise UsageError(f"the launcher started {asked} processes, and accelerate knows of {state.num_processes}")
    return World(state.process_index, asked, group, store)


def _is_loss_of_peer(error: Exception) -> bool:
    """Whether a process that was to answer is gone: gloo's and NCCL's words have no type of their own."""
    if isinstance(error, FtcliError):
        return False
    return isinstance(error, distributed.DistError) or any(words in str(error) for words in _LOSS_OF_PEER)
