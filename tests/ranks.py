"""Runs a function in several processes that share a process group; a hang fails, and never blocks.

The processes are forked from a server that has imported ``tests.warm``, so they start at once.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

DEADLINE = 240.0
"""Seconds after which a run counts as hanging."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one rank: its value, or else what it raised."""

    value: Any = None
    error: str = ""
    message: str = ""


DIED = Outcome(error="died")


def launch(
    world: int,
    function: Callable[..., Any],
    *args: Any,  # noqa: ANN401
    patience: float = 60.0,
    wait_for: list[int] | None = None,
) -> list[Outcome]:
    """The outcome of ``function(rank, *args)`` on each rank, or on those of ``wait_for`` alone.

    Args:
        world: how many processes.
        function: of a module that can be imported; its result must survive pickling.
        args: the same.
        patience: timeout of the process group, in seconds.
        wait_for: ranks; the others are killed when these are done.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        store = Path(folder) / "store"
        ranks = [
            context.Process(target=_rank, args=(rank, world, store, patience, pipe, function, args), daemon=True)
            for rank, (_, pipe) in enumerate(pipes)
        ]
        for process, (_, pipe) in zip(ranks, pipes, strict=True):
            process.start()
            pipe.close()  # the other end shows when the process is gone
        try:
            end = time.monotonic() + DEADLINE
            return [_received(pipes[rank][0], end) for rank in wait_for or range(world)]
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _received(pipe: Connection, end: float) -> Outcome:
    if not pipe.poll(max(0.0, end - time.monotonic())):
        raise TimeoutError(f"a rank has not finished within {DEADLINE} seconds")
    try:
        outcome = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return DIED
    assert isinstance(outcome, Outcome)
    return outcome


def _rank(
    rank: int,
    world: int,
    store: Path,
    patience: float,
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    timeout = timedelta(seconds=patience)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=world, timeout=timeout)
    try:
        outcome = Outcome(function(rank, *args))
    except Exception as error:  # noqa: BLE001 - for the test to judge
        outcome = Outcome(None, type(error).__name__, str(error))
    # Not send(), which would hand over tensors in shared memory of a process that is about to end.
    pipe.send_bytes(pickle.dumps(outcome))
    if not outcome.error:
        with suppress(RuntimeError):
            dist.barrier()  # whoever leaves first would look dead to the others
    os._exit(0)


def single_process() -> None:
    """Start a process group of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)


__all__ = ["DIED", "Outcome", "launch", "single_process"]
