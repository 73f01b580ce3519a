"""Engines that ipyparallel's MPI and SSH launchers start, as the profile of a cluster says."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path

import pytest
from ipyparallel.error import EngineError

from refdist.lab import cluster
from refdist.lab.cluster import PROFILE, reserve_ports
from refdist.lab.engines import LocalEngines
from refdist.lab.hosts import Hosts, NoHostsError

ROOT = Path(__file__).parent.parent
DEADLINE = 110.0

# Cells of a notebook, on whatever engines the profile starts. The second engine is interrupted,
# stopped, continued and killed.

PROGRAM = """
import faulthandler, json, os, psutil, signal, sys, time
from pathlib import Path
from refdist.lab.engines import LocalEngines

CELL = '''
import os
from refdist import StatelessProcessGroup
with StatelessProcessGroup.create(
    host, port, rank, world_size, listen_socket=listen_socket
) as group:
    told = "OMPI_COMM_WORLD_SIZE", "SSH_CONNECTION", "REFDIST_TEST", "OMP_NUM_THREADS"
    network = os.readlink("/proc/self/ns/net")
    gathered = group.all_gather_obj([rank, host, network, *map(os.environ.get, told)])
'''

faulthandler.dump_traceback_later(100, exit=True)  # says where it hangs

def until(condition):
    while not condition():
        time.sleep(0.01)

with LocalEngines(2, timeout=90, environment={"REFDIST_TEST": "yes"}) as engines:
    engines.view.execute(CELL, block=True)
    second = psutil.Process(engines.client[1].apply_sync(os.getpid))
    sleeps = Path(sys.argv[1])
    cell = f"import time; open({str(sleeps)!r}, 'w').close(); time.sleep(600)"
    waiting = engines.client[1].execute(cell, block=False)
    until(sleeps.exists)
    engines.signal(1, signal.SIGINT)  # a second one might hit the engine while it answers
    assert "KeyboardInterrupt" in repr(waiting.exception())
    engines.signal(1, signal.SIGSTOP)
    until(lambda: second.status() == psutil.STATUS_STOPPED)
    assert engines.answering() == [0]
    engines.signal(1, signal.SIGCONT)
    gathered = engines.gather("gathered")
    engines.signal(1, signal.SIGKILL)
    assert engines.state(1) == "has ended"
    print(json.dumps(gathered))
"""


def run_program(profile, *inside):
    """What each of two engines gathered, when the program runs ``inside`` a command."""
    finished = subprocess.run(
        [*inside, sys.executable, "-c", PROGRAM, profile.parent / "sleeps"],
        env=os.environ | {PROFILE: str(profile), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    first, second = json.loads(finished.stdout.splitlines()[-1])
    assert first == second
    assert [member[0] for member in first] == [0, 1]
    assert [member[-2:] for member in first] == [["yes", "1"]] * 2
    return first


reserved = []  # ports of controllers, until all tests have ended


def write_profile(folder, text):
    folder.mkdir()
    one, ports = reserve_ports()
    reserved.append(one)
    arguments = [cluster._PERIOD, cluster._MISSES, f"--ports={ports}"]
    text = f"c = get_config()\nc.Cluster.controller_args = {arguments}\n{textwrap.dedent(text)}"
    (folder / "ipcluster_config.py").write_text(text)
    return folder


# By mpiexec. ipyparallel's launcher asks its engines to import mpi4py, which refdist does not need.

MPI = """
    from ipyparallel.cluster.launcher import MPIEngineSetLauncher

    class WithoutMpi4py(MPIEngineSetLauncher):
        program = property(lambda self: self.engine_cmd)

    c.Cluster.engine_launcher_class = WithoutMpi4py
    c.MPIEngineSetLauncher.mpi_args = ["--allow-run-as-root", "--oversubscribe"]
"""


def test_mpi(tmp_path):
    if not (shutil.which("mpiexec") and shutil.which("ompi_info")):
        pytest.skip("mpiexec of Open MPI is missing (Debian: openmpi-bin)")
    found = run_program(write_profile(tmp_path / "profile", MPI))
    assert [member[1] for member in found] == ["127.0.0.1"] * 2
    assert [member[3] for member in found] == ["2"] * 2


def test_a_launcher_that_fails_is_not_waited_for(tmp_path, monkeypatch):
    command = ["sh", "-c", "echo no host; exit 3"]
    text = MPI.replace("c.MPI", f"c.MPILauncher.mpi_cmd = {command}\n    c.MPI")
    monkeypatch.setenv(PROFILE, str(write_profile(tmp_path / "profile", text)))
    with pytest.raises(EngineError, match=r"stopped: {'exit_code': 3.*\n.*\nno host"):
        LocalEngines(2)


def test_a_profile_must_exist(tmp_path, monkeypatch):
    monkeypatch.setenv(PROFILE, str(tmp_path / "none"))
    with pytest.raises(ValueError, match=f"{PROFILE}=.*/none: there is no .*/none; make it with"):
        LocalEngines(2)


# By SSH to this machine, and from one host to two others. Each connection has a server of its own,
# which needs no port.

SSH = """
    c.Cluster.engine_launcher_class = "ssh"
    c.Cluster.controller_ip = {controller!r}
    c.SSHEngineSetLauncher.engines = {engines!r}
    c.SSHLauncher.ssh_args = c.SSHLauncher.scp_args = ["-F", {config!r}]
    c.SSHLauncher.remote_python = {python!r}
    c.SSHLauncher.remote_profile_dir = {remote!r}
    c.EngineLauncher.environment = {{"PYTHONPATH": {root!r}}}
"""


@pytest.fixture
def ssh(tmp_path):
    """Writes a profile for SSH: address of the controller, engines by name, and where these are."""
    server = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if not (server and shutil.which("ssh") and shutil.which("scp")):
        pytest.skip("ssh, scp or sshd is missing (Debian: openssh-server)")
    for name in ("key", "host_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name]
        subprocess.run(command, check=True, timeout=20)
    (tmp_path / "sshd_config").write_text(
        f"HostKey {tmp_path}/host_key\nAuthorizedKeysFile {tmp_path}/key.pub\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nSubsystem sftp internal-sftp\n"
    )
    if os.getuid() == 0 and not Path("/run/sshd").exists():
        Path("/run/sshd").mkdir(mode=0o755)  # as its service does

    def write(controller, inside):
        text = ""
        for name, prefix in inside.items():
            text += f"Host {name}\n  ProxyCommand {prefix} {server} -i -f {tmp_path}/sshd_config\n"
        text += f"Host *\n  IdentityFile {tmp_path}/key\n  StrictHostKeyChecking no\n"
        text += f"  UserKnownHostsFile {tmp_path}/known\n  LogLevel ERROR\n"
        (tmp_path / "ssh_config").write_text(text)
        values = {
            "controller": controller,
            "engines": {name: 2 // len(inside) for name in inside},
            "config": f"{tmp_path}/ssh_config",
            "python": sys.executable,
            "remote": f"{tmp_path}/remote",
            "root": str(ROOT),
        }
        return write_profile(tmp_path / "profile", SSH.format(**values))

    return write


def test_ssh_to_this_machine(ssh):
    found = run_program(ssh("127.0.0.1", {"this": ""}))
    assert [member[1] for member in found] == ["127.0.0.1"] * 2
    assert all(member[4] for member in found), "not by SSH"


def test_ssh_to_other_hosts(ssh):
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(Hosts(3))
        except NoHostsError as error:
            pytest.skip(str(error))
        inside = {f"host{i}": f"ip netns exec {hosts.namespace(i)}" for i in (1, 2)}
        profile = ssh(hosts.ipv4(0), inside)
        found = run_program(profile, "ip", "netns", "exec", hosts.namespace(0))
        assert found[0][1] in (hosts.ipv4(1), hosts.ipv4(2))
        assert len({member[2] for member in found}) == 2, "both on one host"
