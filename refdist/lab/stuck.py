"""Tools for a job that hangs: a thread to run it in, a console to look at it, torch's records."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ipyparallel
from ipykernel.connect import get_connection_file
from jupyter_client.blocking.client import BlockingKernelClient
from torch._C import _distributed_c10d as c10d

from refdist.lab.engines import LocalEngines

RECORDING = {"TORCH_FR_BUFFER_SIZE": "64", "TORCH_NCCL_TRACE_BUFFER_SIZE": "64"}
"""Switches torch's flight recorder on, by its name of today and that of older versions of torch."""


def in_thread(function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
    """Start a function in a thread of its own, so that the main thread can answer questions.

    Returns:
        A future: ``done()`` says whether the function has ended, ``result(seconds)`` waits for it.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    # a daemon: it does not keep the process from ending
    threading.Thread(target=run, daemon=True, name="refdist-job").start()
    return future


class Console:
    """A second client of an engine, as ``jupyter console --existing FILE`` would be.

    It needs the engine's main thread twice: now, to be let in, and for every answer. The engine
    must run on this machine, where its file and its ports are.

    Attributes:
        file: the connection file.
    """

    def __init__(self, engines: LocalEngines, rank: int) -> None:
        self.file: str = engines.run(_let_in)[rank]
        self._client = BlockingKernelClient(connection_file=self.file)
        self._client.load_connection_file()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=30)

    def ask(self, code: str, timeout: float = 20.0) -> str:
        """Run code on the engine, and return what it printed.

        Raises:
            TimeoutError: no answer in this time. The engine runs the code when it is free.
            RuntimeError: the code raised; the text says what.
        """
        printed: list[str] = []

        def keep(message: dict[str, Any]) -> None:
            printed.append(message["content"].get("text", ""))

        reply = self._client.execute_interactive(
            code, allow_stdin=False, timeout=timeout, output_hook=keep
        )["content"]
        if reply["status"] != "ok":
            raise RuntimeError(f"{reply.get('ename')}: {reply.get('evalue')}")
        return "".join(printed).strip()

    def close(self) -> None:
        """Leave; the engine stays."""
        self._client.stop_channels()


def _let_in(rank: int, world_size: int) -> str:
    """Runs on an engine: it listens for consoles from now on."""
    ipyparallel.bind_kernel()
    return str(get_connection_file())


def torch_records() -> list[dict[str, Any]] | None:
    """The records of torch's flight recorder for this process, oldest first.

    Gloo is recorded by torch 2.13, where the environment of ``RECORDING`` is set before torch is
    imported. Returns None on a torch without such a recorder, such as 2.6.
    """
    dump: Any = getattr(c10d, "_dump_fr_trace_json", None)
    if dump is None:
        return None
    return [
        {
            "operation": entry["profiling_name"],
            "number": entry["collective_seq_id"],
            "shapes": [tuple(size) for size in entry["input_sizes"]],
            "done": entry["retired"],
        }
        for entry in json.loads(dump())["entries"]
    ]
