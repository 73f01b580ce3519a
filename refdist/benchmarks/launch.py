"""Ranks for a benchmark: real processes of this machine, which run the same function."""

import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import TCPStore

from refdist.store import create_tcp_store

_DEADLINE = timedelta(minutes=10)


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, seconds: float = 600
) -> list[Any]:
    """Call ``function(rank, world_size, board, *arguments)`` on ``world_size`` processes.

    Args:
        function: of a module, so that the processes find it. ``board`` is a TCPStore that all
            share, on which they can tell each other ports.
        world_size: the number of processes.
        arguments: what else it gets.
        seconds: how long the whole may take.

    Returns:
        What each returned, in rank order.

    Raises:
        RuntimeError: a rank raised, died or did not end in time; the text has its traceback.
    """
    board = create_tcp_store("127.0.0.1", 0, is_master=True, timeout=_DEADLINE)
    # forked from a process that has imported torch: tens of milliseconds, not seconds
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    processes, pipes = [], []
    try:
        for rank in range(world_size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank,
                args=(there, function, rank, world_size, board.port, arguments),
                daemon=True,
            )
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        return _collect(pipes, time.monotonic() + seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], end: float) -> list[Any]:
    answers: dict[int, Any] = {}
    while len(answers) < len(pipes):
        missing = [rank for rank in range(len(pipes)) if rank not in answers]
        ready = wait([pipes[rank] for rank in missing], max(0.0, end - time.monotonic()))
        if not ready:
            raise RuntimeError(f"ranks {missing} of {len(pipes)} did not end in time")
        for rank in missing:
            if pipes[rank] not in ready:
                continue
            try:
                succeeded, answer = pipes[rank].recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} of {len(pipes)} died") from None
            if not succeeded:
                raise RuntimeError(f"rank {rank} of {len(pipes)} raised:\n{answer}")
            answers[rank] = answer
    return [answers[rank] for rank in range(len(pipes))]


def _run_rank(
    pipe: "Connection[Any, Any]",
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        board: TCPStore = create_tcp_store("127.0.0.1", port, timeout=_DEADLINE)
        answer = True, function(rank, world_size, board, *arguments)
    except BaseException:
        answer = False, traceback.format_exc()
    pipe.send(answer)
