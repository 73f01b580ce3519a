"""Several hosts on one machine: network namespaces, each with one cable to a switch of their own.

Nothing in there reaches the machine's own network, nor is it reached from there. A rank is moved to
a host after it has connected to the test's board, so the board is still there when a cable is not.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_NEW_NETWORK, _NEW_MOUNTS = 0x40000000, 0x00020000  # CLONE_NEWNET and CLONE_NEWNS of Linux


class NoHostsError(Exception):
    """This machine forbids network namespaces, or lacks the tool. The text says which."""


class Hosts:
    """Hosts 0 to ``count - 1``, as a context manager that removes them again.

    Each has a network card ``eth0`` with three addresses: ``ipv4(i)``, ``ipv6(i)``, and the local
    one of its link, ``fe80::1`` for host 0, which is of use only with ``%eth0``.
    """

    def __init__(self, count: int = 3) -> None:
        self._name = f"refdist-{os.getpid()}"
        self.count = count

    def namespace(self, host: int | str) -> str:
        """The name of a host's namespace, or of the switch's."""
        return f"{self._name}-{host}"

    def ipv4(self, host: int) -> str:
        return f"10.99.0.{host + 1}"

    def ipv6(self, host: int) -> str:
        return f"fd99::{host + 1}"

    def __enter__(self) -> "Hosts":
        if shutil.which("ip") is None:
            raise NoHostsError("ip is missing (Debian: iproute2)")
        try:
            for name in ["switch", *range(self.count)]:
                _run("ip", "netns", "add", self.namespace(name))
            self._build()
        except subprocess.CalledProcessError as error:
            self.__exit__()
            raise NoHostsError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None
        return self

    def _build(self) -> None:
        # a port of the switch forwards at once, and an address is used at once
        self._ip("switch", "link add bridge type bridge stp_state 0 mcast_snooping 0")
        self._ip("switch", "link set bridge up")
        for i in range(self.count):
            peer = f"peer name eth0 netns {self.namespace(i)}"
            self._ip("switch", f"link add port{i} type veth {peer}")
            self._ip("switch", f"link set port{i} master bridge up")
            self._ip(
                i,
                "link set eth0 addrgenmode none",
                "link set lo up",
                "link set eth0 up",
                f"address add {self.ipv4(i)}/24 dev eth0",
                f"address add {self.ipv6(i)}/64 dev eth0 nodad",
                f"address add fe80::{i + 1}/64 dev eth0 nodad",
            )

    def __exit__(self, *error: object) -> None:
        for name in ["switch", *range(self.count)]:
            subprocess.run(
                ["ip", "netns", "del", self.namespace(name)], capture_output=True, check=False
            )

    def _ip(self, name: int | str, *commands: str) -> None:
        batch = ["ip", "-n", self.namespace(name), "-batch", "-"]
        _run(*batch, text="\n".join(commands))

    def enter(self, host: int) -> None:
        """Move this thread, and those that it starts, to a host."""
        descriptor = os.open(f"/run/netns/{self.namespace(host)}", os.O_RDONLY)
        try:
            _call("setns", descriptor, _NEW_NETWORK)
        finally:
            os.close(descriptor)

    def cut(self, host: int) -> None:
        """Pull a host's cable. Packets vanish, and no connection is told."""
        self._ip("switch", f"link set port{host} down")

    def mend(self, host: int) -> None:
        """Plug a host's cable in again."""
        self._ip("switch", f"link set port{host} up")

    def drop_port(self, host: int, port: int, card: str) -> None:
        """Let a firewall on a host drop what comes to a TCP port over ``eth0`` or ``lo``.

        Raises:
            NoHostsError: there is no firewall to be set.
        """
        inside = ["ip", "netns", "exec", self.namespace(host)]
        try:
            if shutil.which("nft"):
                chain = f"type filter hook input priority 0; iifname {card} tcp dport {port} drop;"
                rules = f"table inet refdist {{ chain {card} {{ {chain} }}; }}"
                _run(*inside, "nft", "-f", "-", text=rules)
            elif shutil.which("iptables"):
                rule = f"-A INPUT -i {card} -p tcp --dport {port} -j DROP".split()
                _run(*inside, "iptables", *rule)
                _run(*inside, "ip6tables", *rule)
            else:
                raise NoHostsError("nft and iptables are missing (Debian: nftables)")
        except subprocess.CalledProcessError as error:
            raise NoHostsError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None

    def prohibit_route(self, host: int, address: str) -> None:
        """Let a host refuse to send anything to an address."""
        self._ip(host, f"route add prohibit {address}")


def know_names(names: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Give this thread, and those that it starts, a file of hosts' names of its own."""
    file = folder / f"hosts-{os.getpid()}"
    file.write_text("".join(f"{a} {name}\n" for name, many in names.items() for a in many))
    _call("unshare", _NEW_MOUNTS)
    _run("mount", "--make-rprivate", "/")
    _run("mount", "--bind", str(file), "/etc/hosts")


def _run(*command: str, text: str = "") -> None:
    subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=20)


def _call(name: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
