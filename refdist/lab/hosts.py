"""Several hosts on one machine, and a cable to each that can be pulled.

Where the machine allows it, a host is a network namespace of Linux: a network card, addresses and
routes of its own, apart from those of the machine, with one cable to a switch. Else a host is an
address of this machine, and its cable is a program that relays what comes to that address.

``open_hosts`` makes the one or the other. A pulled cable looks the same to the ranks: nothing comes
through it any more, and no connection is told.
"""

import atexit
import ctypes
import itertools
import os
import shutil
import socket
import subprocess
import threading
from contextlib import suppress
from typing import Any, Self

from refdist.store.listening import listen

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of Linux
_PIECE_BYTES = 64 * 2**10
_numbers = itertools.count()
_opened: "list[Hosts | RelayedHosts]" = []


class NoHostsError(Exception):
    """This machine forbids network namespaces, or lacks the tool. The text says which."""


def open_hosts(engines: Any, count: int = 2) -> "Hosts | RelayedHosts":
    """Open ``count`` hosts, and give each engine the name ``hosts``: it can enter one of them.

    The hosts end with ``remove``, or when this is called again, or with this process.

    Args:
        engines: LocalEngines, all on this machine.
        count: number of hosts, at most 200.
    """
    remove_all()
    hosts: Hosts | RelayedHosts
    try:
        hosts = Hosts(count).__enter__()
    except NoHostsError:
        hosts = RelayedHosts(count)
    _opened.append(hosts)
    engines.view.push({"hosts": hosts}, block=True)
    return hosts


@atexit.register
def remove_all() -> None:
    """Remove the hosts that this process has opened."""
    while _opened:
        _opened.pop().remove()


class Hosts:
    """Hosts 0 to ``count - 1``, as a context manager that removes them again: namespaces.

    Nothing in there reaches the machine's own network, nor is it reached from there. Each has a
    network card ``eth0`` with three addresses: ``ipv4(i)``, ``ipv6(i)``, and the local one of its
    link, ``fe80::1`` for host 0, which is of use only with ``%eth0``.
    """

    def __init__(self, count: int = 3) -> None:
        self._name = f"refdist-{os.getpid()}-{next(_numbers)}"
        self.count = count
        self.here = 0
        self._home: int | None = None

    def __repr__(self) -> str:
        return f"{self.count} hosts, each with a network of its own"

    def namespace(self, host: int | str) -> str:
        """The name of a host's namespace, or of the switch's."""
        return f"{self._name}-{host}"

    def ipv4(self, host: int) -> str:
        """The IPv4 address of a host."""
        return f"10.99.0.{host + 1}"

    def ipv6(self, host: int) -> str:
        """The IPv6 address of a host."""
        return f"fd99::{host + 1}"

    def __enter__(self) -> Self:
        if shutil.which("ip") is None:
            raise NoHostsError("ip is missing (Debian: iproute2)")
        try:
            for name in ["switch", *range(self.count)]:
                run("ip", "netns", "add", self.namespace(name))
            self._build()
        except (subprocess.SubprocessError, OSError) as error:
            self.remove()
            told = str(getattr(error, "stderr", None) or error)
            raise NoHostsError(f"ip made no network namespaces: {told.strip()}") from None
        except BaseException:
            self.remove()
            raise
        return self

    def _build(self) -> None:
        # a port of the switch forwards at once, and an address is used at once
        self.ip("switch", "link add bridge type bridge stp_state 0 mcast_snooping 0")
        self.ip("switch", "link set bridge up")
        for i in range(self.count):
            peer = f"peer name eth0 netns {self.namespace(i)}"
            self.ip("switch", f"link add port{i} type veth {peer}")
            self.ip("switch", f"link set port{i} master bridge up")
            self.ip(
                i,
                "link set eth0 addrgenmode none",
                "link set lo up",
                "link set eth0 up",
                f"address add {self.ipv4(i)}/24 dev eth0",
                f"address add {self.ipv6(i)}/64 dev eth0 nodad",
                f"address add fe80::{i + 1}/64 dev eth0 nodad",
            )

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the hosts. A process that is in one keeps it until the process ends."""
        for name in ["switch", *range(self.count)]:
            delete = ["ip", "netns", "del", self.namespace(name)]
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run(delete, capture_output=True, check=False, timeout=20)

    def ip(self, name: int | str, *commands: str) -> None:
        """Let the tool ``ip`` run commands on a host, or on the switch."""
        batch = ["ip", "-n", self.namespace(name), "-batch", "-"]
        run(*batch, text="\n".join(commands))

    def enter(self, host: int) -> None:
        """Move this thread, and those that it starts, to a host.

        Sockets that are open stay where they are: an engine still hears its notebook.
        """
        if self._home is None:
            self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        descriptor = os.open(f"/run/netns/{self.namespace(host)}", os.O_RDONLY)
        try:
            call_libc("setns", descriptor, _NEW_NETWORK)
        finally:
            os.close(descriptor)
        self.here = host

    def leave(self) -> None:
        """Move this thread back to the network from which it first entered a host."""
        if self._home is not None:
            call_libc("setns", self._home, _NEW_NETWORK)
            os.close(self._home)
            self._home = None

    def cut(self, host: int) -> None:
        """Pull a host's cable. Packets vanish, and no connection is told."""
        self.ip("switch", f"link set port{host} down")

    def mend(self, host: int) -> None:
        """Plug a host's cable in again."""
        self.ip("switch", f"link set port{host} up")

    def offer_port(self, engines: Any) -> None:
        """As ``engines.offer_port()``, for a store on host 0, where engine 0 must be."""
        port = _bind(engines, self.ipv4(0))
        _tell(engines, [(self.ipv4(0), port)] * self.count)


class RelayedHosts:
    """Hosts 0 to ``count - 1`` without namespaces: 127.0.0.1, 127.0.0.2 and so on.

    A rank of another host than 0 reaches the store through a relay, which is its host's cable. A
    machine that has no address but 127.0.0.1 uses that for all.
    """

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self.here = 0
        self._plugged = [threading.Event() for _ in range(count)]
        self._relays: list[Relay] = []
        for host in range(count):
            self.mend(host)

    def __repr__(self) -> str:
        return f"{self.count} hosts, which are addresses of this machine, with relays for cables"

    def __reduce__(self) -> tuple[Any, ...]:
        return RelayedHosts, (self.count,)  # an engine's own knows no relays

    def ipv4(self, host: int) -> str:
        """The IPv4 address of a host."""
        return f"127.0.0.{host + 1}"

    def enter(self, host: int) -> None:
        """Let ``offer_port`` give this engine the address that this host reaches."""
        if not 0 <= host < self.count:
            raise ValueError(f"host={host}: must be 0 to {self.count - 1}")
        self.here = host

    def leave(self) -> None:
        """Do nothing: this engine has not left the machine's network."""

    def cut(self, host: int) -> None:
        """Pull a host's cable: its relays hold back all that comes, and tell no connection."""
        self._plugged[host].clear()

    def mend(self, host: int) -> None:
        """Plug a host's cable in again."""
        self._plugged[host].set()

    def offer_port(self, engines: Any) -> None:
        """As ``engines.offer_port()``, for a store on host 0, where engine 0 must be."""
        store = self.ipv4(0), _bind(engines, self.ipv4(0))
        relays = [Relay(self.ipv4(i), store, self._plugged[i]) for i in range(1, self.count)]
        self._relays += relays
        _tell(engines, [store, *(relay.address for relay in relays)])

    def remove(self) -> None:
        """Close the relays, and so all connections through them."""
        for relay in self._relays:
            relay.close()
        self._relays.clear()


class Relay:
    """Passes on what comes to an address to another one, and back, while ``plugged`` is set."""

    def __init__(self, host: str, target: tuple[str, int], plugged: threading.Event) -> None:
        try:
            self._listener = listen(host, 0)
        except OSError:  # macOS has 127.0.0.1 alone
            self._listener = listen(target[0], 0)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._target, self._plugged = target, plugged
        self._open: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Close all connections."""
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._plugged.wait()
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    continue
                self._open += [near, far]
                for ends in [(near, far), (far, near)]:
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        piece = b"some"
        while piece:
            try:
                piece = source.recv(_PIECE_BYTES)
            except OSError:
                piece = b""
            self._plugged.wait()
            with suppress(OSError):
                if piece:
                    sink.sendall(piece)
                else:
                    sink.shutdown(socket.SHUT_WR)


def run(*command: str, text: str = "") -> None:
    """Run a command that reads a text, and raise CalledProcessError if it fails."""
    subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=20)


def call_libc(name: str, *arguments: int) -> None:
    """Call a function of the C library that returns 0, and raise OSError if it does not."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _bind(engines: Any, host: str) -> int:
    """Let engine 0 listen on a free port there."""
    engines.view.execute(
        "from refdist.store.listening import listen as _listen\n"
        f"listen_socket = None if rank else _listen({host!r}, 0)\n"
        "port = None if rank else listen_socket.getsockname()[1]",
        block=True,
    )
    return int(engines.gather("port")[0])


def _tell(engines: Any, routes: list[tuple[str, int]]) -> None:
    """Set ``host`` and ``port`` on each engine to the route to the store from its own host."""
    engines.view.push({"_routes": routes}, block=True)
    engines.view.execute("host, port = _routes[hosts.here]", block=True)
