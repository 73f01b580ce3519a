"""What only tests do to hosts: firewalls, routes that are prohibited, and files of hosts' names.

A rank is moved to a host after it has connected to the test's board, so the board is still there
when a cable is not.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from refdist.lab.hosts import Hosts, NoHostsError, call_libc, run

_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS of Linux


class HostsUnderTest(Hosts):
    """Hosts with firewalls and routes."""

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
                run(*inside, "nft", "-f", "-", text=rules)
            elif shutil.which("iptables"):
                rule = f"-A INPUT -i {card} -p tcp --dport {port} -j DROP".split()
                run(*inside, "iptables", *rule)
                run(*inside, "ip6tables", *rule)
            else:
                raise NoHostsError("nft and iptables are missing (Debian: nftables)")
        except subprocess.CalledProcessError as error:
            raise NoHostsError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None

    def prohibit_route(self, host: int, address: str) -> None:
        """Let a host refuse to send anything to an address."""
        self.ip(host, f"route add prohibit {address}")


def know_names(names: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Give this thread, and those that it starts, a file of hosts' names of its own."""
    file = folder / f"hosts-{os.getpid()}"
    file.write_text("".join(f"{a} {name}\n" for name, many in names.items() for a in many))
    call_libc("unshare", _NEW_MOUNTS)
    run("mount", "--make-rprivate", "/")
    run("mount", "--bind", str(file), "/etc/hosts")
