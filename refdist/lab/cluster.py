"""Clusters of ipyparallel, each a controller and its engines, here or where a profile says."""

import asyncio
import logging
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import Any

import ipyparallel
from ipyparallel.error import EngineError

PROFILE = "REFDIST_PROFILE"
SETTINGS = {
    "OMP_NUM_THREADS": "1",  # four engines share the few cores of a laptop
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # a lost connection would fill a notebook with stack traces
    # torch looks up the name of each address that it connects to; a lost answer costs 5 s, or 1
    "RES_OPTIONS": "timeout:1 attempts:1",
}
"""Variables of the engines, where nothing else sets them."""

# an engine is there once it has answered to a heartbeat, which ipyparallel sends every 3 s
_PERIOD = "--HeartMonitor.period=500"
# it gives up an engine that misses 10 of them, and so one that was stopped for half a minute. A
# reader may take an hour until the cell that lets it go on.
_MISSES = "--HeartMonitor.max_heartmonitor_misses=7200"


_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_PORTS = 20  # of a controller, and one more


class Cluster(ipyparallel.Cluster):  # type: ignore[misc]
    """A cluster that shows nothing while it starts, and whose errors have its output."""

    async def start_and_connect(self, n: int, timeout: float) -> Any:
        """Start ``n`` engines, and return a client of them.

        ipyparallel's own method starts the engines first. A client gets a list of those that are
        there, and then news of others, so it never hears of one that comes just between. Besides,
        that method shows a bar of progress, which no two runs store alike; and its errors do not
        say why an engine ended, while the file that does is removed with the cluster.

        Raises:
            TimeoutError: not all engines started in time.
            ipyparallel.error.EngineError: what started them has ended.
        """
        await self.start_controller()
        client = await self.connect_client()
        try:
            await self.start_engines(n)
            started = client.wait_for_engines(n, timeout=timeout, block=False, interactive=False)
            await asyncio.wrap_future(started)
        except BaseException as error:
            client.close()
            if not isinstance(error, EngineError | TimeoutError):
                raise
            output = self.engine_set.get_output()
            raise type(error)(f"{error}\nOutput of the engines:\n{output}") from None
        return client


def reserve_ports() -> tuple[socket.socket, str]:
    """Ports for a controller, such as "20001-20019", for as long as the socket is not closed.

    ipyparallel binds a socket to any free port, closes it, and has another process bind that port
    a second later. Meanwhile, a socket of any other program may get it, and the cluster hangs. So
    these ports are none that the system gives away, and the socket keeps other clusters from them.
    """
    end = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 32768
    for _ in range(1000):
        first = random.randrange(10_000, max(end, 20_000) - _PORTS, _PORTS)
        try:
            # the others are only looked at
            for port in range(first + _PORTS - 1, first - 1, -1):
                reserved = socket.socket()
                reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, port > first)
                reserved.bind(("127.0.0.1", port))
                if port > first:
                    reserved.close()
            return reserved, f"{first + 1}-{first + _PORTS - 1}"
        except OSError:
            reserved.close()
    raise OSError(f"no {_PORTS} ports in a row are free below {end}")


def on_this_machine(n: int, environment: dict[str, str]) -> Cluster:
    """A cluster that is to start here, with a folder of its own, which is the caller's to remove.

    The profile of the user is not used: it may start engines elsewhere.
    """
    reserved, ports = reserve_ports()
    cluster = Cluster(
        n=n,
        profile_dir=tempfile.mkdtemp(prefix="refdist-engines-"),
        controller_ip="127.0.0.1",
        controller_args=[_PERIOD, _MISSES, f"--ports={ports}"],
        engine_launcher_class="local",
        controller_launcher_class="local",
        log_level=logging.ERROR,
        cluster_file="",  # ipyparallel would restore it and the folder when an engine ends
        shutdown_atexit=False,  # engine_guard ends the engines
    )
    # besides this process's own; RES_OPTIONS has no effect after an engine's first look-up
    settings = {name: os.environ.get(name, value) for name, value in SETTINGS.items()}
    cluster.config.LocalEngineLauncher.environment = settings | environment
    cluster.reserved = reserved
    return cluster


def of_profile(n: int, name: str) -> Cluster:
    """A cluster that is to start as a profile says, which is named by itself or by its folder.

    Raises:
        ValueError: there is no such profile.
    """
    place = {"profile_dir": name} if os.sep in name else {"profile": name}
    cluster = Cluster(n=n, log_level=logging.ERROR, **place)
    if not Path(cluster.profile_dir).is_dir():
        raise ValueError(
            f"{PROFILE}={name}: there is no {cluster.profile_dir}; make it with "
            f"'ipython profile create --parallel'"
        )
    return cluster
