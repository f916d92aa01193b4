"""Work done ahead by a few threads, its results in order.

    tasks ─▶ pool: as many under way as there are threads ─▶ results, the oldest first

Tasks come from the caller's own thread and are asked for only when there is room, so that little is held at a time.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_MOST_THREADS = 8
Result = TypeVar("Result")


def count_threads() -> int:
    """How many threads encode: the processors that this process may use, at most 8; on a GPU two take turns."""
    if torch.cuda.is_available():
        return 2
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def run_ahead(tasks: Iterable[Callable[[], Result]], n_threads: int) -> Generator[Result]:
    """Yields what ``tasks`` return, in their order; closing it waits for those under way and drops the rest.

    Each has one thread inside torch, which serves best on a busy machine; ``n_threads`` + 1 are at most held. What a
    task raises is raised where its result would have come.
    """
    n_inside = torch.get_num_threads()
    pool = ThreadPoolExecutor(n_threads, "ftcli-ahead", initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            del task  # it holds its input, which the pool lets go of when it is done
            if len(waiting) > n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n_inside)  # the pool's threads also set the number that new threads begin with
