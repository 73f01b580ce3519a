"""Ranks for a benchmark: its own processes on this machine, or torchrun's."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import PrefixStore, Store

from refdist.store.listening import create_tcp_store, listen

LOCAL = "127.0.0.1"
_DEADLINE = timedelta(minutes=10)


def under_torchrun() -> bool:
    """Whether torchrun has started this process as one of several ranks."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)


def run_as_rank(function: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
    """Call ``function(rank, world_size, board, *arguments)`` as the rank that torchrun assigns.

    The board is torchrun's own store, below a prefix.

    Returns:
        The rank, and the function's result.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = create_tcp_store(host, port, is_master=serves, timeout=_DEADLINE)
    prefix = f"refdist/benchmarks/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    board = PrefixStore(prefix, store)
    result = function(rank, world_size, board, *arguments)
    board.set(f"ended/{rank}", "")
    if serves:
        board.wait([f"ended/{other}" for other in range(world_size)])
    return rank, result


@contextmanager
def place(
    rank: int, board: Store, name: str, host: str = LOCAL
) -> Iterator[tuple[int, socket.socket | None]]:
    """A port of ``host`` that rank 0 has bound, and on rank 0 a socket for the callee to keep."""
    if rank != 0:
        yield int(board.get(f"port/{name}")), None
        return
    with listen(host, 0) as listener:
        board.set(f"port/{name}", str(listener.getsockname()[1]))
        yield listener.getsockname()[1], listener.dup()


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, seconds: float = 600
) -> list[Any]:
    """Call ``function(rank, world_size, board, *arguments)`` on ``world_size`` processes.

    Args:
        function: function of a module, so that the processes find it. ``board`` is a TCPStore
            that all share, for example to tell each other ports.
        world_size: the number of processes.
        arguments: its further arguments.
        seconds: time limit of the whole.

    Returns:
        The result of each process, in rank order.

    Raises:
        RuntimeError: a rank raised, died or did not end in time; the text has its traceback.
    """
    board = create_tcp_store(LOCAL, 0, is_master=True, timeout=_DEADLINE)
    # a fork of a process that has imported torch takes tens of milliseconds, not seconds
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns of each wait that ends
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
        board = create_tcp_store(LOCAL, port, timeout=_DEADLINE)
        answer = True, function(rank, world_size, board, *arguments)
    except BaseException:
        answer = False, traceback.format_exc()
    pipe.send(answer)
