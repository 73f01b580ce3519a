"""A separate process that ends engines when their owner has ended in any way.

The simple ways fail: a killed owner runs no code, and an engine that is stopped or still starting
cannot watch its owner. So the owner starts a guard before the first engine. The guard finds the
engines, their controller and their children by the cluster's id. ipyparallel puts this id into the
environment of each, and their children inherit it.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time

import psutil

_LOOK_SECONDS = 0.2
_LOOKS = 3  # empty ones in a row: a process that was just forked shows no id yet
_TERM_SECONDS = 1.0
_END_SECONDS = 30.0


def start(cluster: str, folder: str | None) -> subprocess.Popen[bytes]:
    """Start a guard of a cluster's processes, and of its folder if the guard must remove it."""
    return subprocess.Popen(
        # by its path, because the package would import torch
        [sys.executable, "-P", __file__, str(os.getpid()), cluster, folder or ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # a Ctrl-C for the owner must not end the guard
    )


def end(guard: subprocess.Popen[bytes]) -> None:
    """Let the guard end the rest of the cluster, and wait for it: about a second."""
    assert guard.stdin is not None
    guard.stdin.close()
    guard.wait(_END_SECONDS)


def _watch(owner: int, cluster: str, folder: str) -> None:
    """Wait until the owner ends or closes the pipe. Then end all processes, until none is left."""
    # the parent's pid changes when the owner ends, even if a child of it holds the pipe open
    while os.getppid() == owner and not select.select([sys.stdin], [], [], _LOOK_SECONDS)[0]:
        pass
    # mpiexec and other launchers pass SIGTERM on to other machines; SIGKILL is the surest signal
    number = signal.SIGKILL if folder else signal.SIGTERM
    looks = 0
    while looks < _LOOKS:
        found = [process for process in psutil.process_iter() if _belongs(process, cluster)]
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        psutil.wait_procs(found, timeout=_TERM_SECONDS)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)  # no engine starts without it
        number = signal.SIGKILL
        looks = 0 if found else looks + 1
        time.sleep(_LOOK_SECONDS)


def _belongs(process: psutil.Process, cluster: str) -> bool:
    try:
        return bool(process.environ().get("IPP_CLUSTER_ID") == cluster)
    except psutil.Error:  # the process has ended, or is another user's
        return False


if __name__ == "__main__":
    _watch(int(sys.argv[1]), *sys.argv[2:])
