"""Ranks that torchrun, mpirun or srun starts find their place by its environment variables."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from refdist import GroupCreationError, StatelessProcessGroup
from refdist.joining.launched import find_place, first_host

ROOT = Path(__file__).parent.parent
DEADLINE = 90.0

# What each program sets on one rank, as seen on torch 2.13 and Open MPI 4.1, and as Slurm
# documents it. Of the two launchers at once, the inner one numbers the ranks.

TORCHRUN = {
    "RANK": "2",
    "WORLD_SIZE": "6",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "52559873",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "node[01-03,7],x",
    "SLURM_STEP_NODELIST": "node[02-03]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.250",  # where srun was called, maybe a login node
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUN, ("10.0.0.1", 29501, 2, 6)),
        (TORCHRUN | {"REFDIST_PORT": "7000"}, ("10.0.0.1", 7000, 2, 6)),
        (MPIRUN | {"MASTER_PORT": "7000"}, ("127.0.0.1", 7001, 1, 4)),
        (MPIRUN | {"MASTER_ADDR": "h", "REFDIST_PORT": "7000"}, ("h", 7000, 1, 4)),
        (SRUN | {"REFDIST_PORT": "7000"}, ("node02", 7000, 3, 4)),
        (SRUN | {"REFDIST_PORT": "7000", "MASTER_ADDR": "fd00::1"}, ("fd00::1", 7000, 3, 4)),
        # an empty variable is none
        (SRUN | {"MASTER_PORT": "7000", "MASTER_ADDR": ""}, ("node02", 7001, 3, 4)),
        (SRUN | TORCHRUN, ("10.0.0.1", 29501, 2, 6)),
        (SRUN | MPIRUN | {"REFDIST_PORT": "7000"}, ("127.0.0.1", 7000, 1, 4)),
    ],
)
def test_the_variables_tell_the_place(environment, expected):
    place = find_place(environment)
    assert (place.host, place.port, place.rank, place.world_size) == expected


def test_keywords_override_the_variables():
    place = find_place(TORCHRUN, host="other", port=7, rank=0, world_size=2)
    assert (place.host, place.port, place.rank, place.world_size) == ("other", 7, 0, 2)
    place = find_place({}, host="other", port=7, rank=0, world_size=2)
    assert (place.host, place.port, place.rank, place.world_size) == ("other", 7, 0, 2)
    place = find_place(TORCHRUN, rank=5)
    assert (place.rank, place.world_size) == (5, 6)


def test_a_step_without_counts_of_its_own_has_those_of_the_job():
    job = {name: value for name, value in SRUN.items() if "STEP" not in name}
    place = find_place(job)
    assert (place.host, place.rank, place.world_size) == ("node01", 3, 8)


@pytest.mark.parametrize("launched", [MPIRUN, SRUN])
def test_the_ranks_of_a_job_agree_on_a_port_that_other_jobs_rarely_have(launched):
    names = {"PMIX_NAMESPACE", "SLURM_JOB_ID"} & set(launched)
    ports = set()
    for job in range(200):
        environment = launched | dict.fromkeys(names, str(52559873 + job * 65536))
        ports.add(find_place(environment).port)
        assert find_place(environment, rank=0).port == find_place(environment).port
    assert len(ports) > 190  # of 10,000, 200 by chance share 2
    # no port of torch's own default, and none that a connection gets by itself
    assert min(ports) >= 15000 and max(ports) < 25000


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({}, "rank and world size are unknown. Found: nothing. Needed: RANK and WORLD_SIZE "),
        ({"RANK": "0"}, r"Found: RANK=0. Needed: RANK and WORLD_SIZE \(torchrun\), or OMPI"),
        ({"SLURM_NTASKS": "2"}, "Found: SLURM_NTASKS=2. Needed: .* SLURM_PROCID and SLURM_STEP"),
        (TORCHRUN | {"RANK": "x"}, "RANK='x': must be an integer"),
        (TORCHRUN | {"RANK": "6"}, r"RANK=6: must be in 0..5 \(WORLD_SIZE=6\)"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR: is missing; set it to an address of rank 0"),
        (TORCHRUN | {"MASTER_PORT": ""}, "REFDIST_PORT: is missing, and so is MASTER_PORT"),
        (TORCHRUN | {"MASTER_PORT": "a"}, "MASTER_PORT='a': must be an integer"),
        (TORCHRUN | {"MASTER_PORT": "65535"}, "port=65536: is MASTER_PORT=65535 plus 1, .*65535"),
        (TORCHRUN | {"REFDIST_PORT": "29500"}, "port=29500: is REFDIST_PORT, but also MASTER_PORT"),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "MASTER_ADDR: .*LOCAL_SIZE=2 of .*SIZE=4"),
        (SRUN | {"SLURM_STEP_NODELIST": "n["}, r"SLURM_STEP_NODELIST='n\[': is no list of hosts"),
    ],
)
def test_what_is_missing_or_wrong_is_named(environment, text):
    with pytest.raises(ValueError, match=text):
        find_place(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node[01-03,7],x", "node01"),
        ("node[7,01-03]", "node7"),
        ("a,node[1-2]", "a"),
        ("rack[1-2]node[04-05]-ib.cluster", "rack1node04-ib.cluster"),
        ("gpu-a[003]", "gpu-a003"),
    ],
)
def test_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",a", "a[", "a[]", "a[1-]", "a]", "a b", "a[1-2"])
def test_what_is_no_list_of_hosts(nodes):
    with pytest.raises(ValueError, match="is no list of hosts"):
        first_host(nodes)


# Errors of creation say where the address came from: on rank 0 when the port is taken, and on any
# rank when the others do not come.


def test_rank_0_says_why_it_took_a_port_that_is_taken(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", str(port - 1))
        text = (
            f"cannot listen on host='127.0.0.1', port={port}: Address already in use.*"
            f"port={port} is MASTER_PORT={port - 1} plus 1.*set REFDIST_PORT on all ranks"
        )
        with pytest.raises(OSError, match=text):
            StatelessProcessGroup.from_env()
        monkeypatch.setenv("REFDIST_PORT", str(port))
        with pytest.raises(OSError, match=f"port={port} is REFDIST_PORT"):
            StatelessProcessGroup.from_env()


def test_a_rank_that_waits_in_vain_says_where_its_address_is_from(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(GroupCreationError, match=r"1 of 2 .* is MASTER_ADDR, port=0 is") as raised:
        StatelessProcessGroup.from_env(port=0, store_timeout=1)
    assert raised.value.missing == (1,)


# The programs themselves. Each rank forms two groups, one after the other, and says what it saw.

PROGRAM = """
import json, os
from refdist import StatelessProcessGroup

seen = []
for _ in range(2):
    with StatelessProcessGroup.from_env(store_timeout=60) as group:
        group.barrier(timeout=30)
        pids = group.all_gather_obj(os.getpid())
        above_master = group.port - int(os.environ.get("MASTER_PORT", group.port))
        seen.append([pids.index(os.getpid()), group.world_size, above_master])
with open(f"{os.getpid()}.json", "w") as file:
    json.dump(seen, file)
"""


def launch(tmp_path, *command, **variables):
    """Run the program under ``command``. What each rank saw, in rank order."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for _ in range(5):
        finished = subprocess.run(
            [*command, program],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        # torchrun takes any free port, and a stranger may have the one above it
        if "Address already in use; rank 0 needs" not in finished.stderr:
            break
    assert finished.returncode == 0, finished.stderr
    return sorted(json.loads(path.read_text()) for path in tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    "options",
    [["--standalone"], ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]],
    ids=["standalone", "rendezvous"],
)
def test_torchrun(tmp_path, options):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *options]
    assert launch(tmp_path, *torchrun) == [[[rank, 2, 1]] * 2 for rank in range(2)]


def test_mpirun(tmp_path):
    if not (shutil.which("mpirun") and shutil.which("ompi_info")):
        pytest.skip("mpirun of Open MPI is missing (Debian: openmpi-bin)")
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "3", sys.executable]
    assert launch(tmp_path, *mpirun) == [[[rank, 3, 0]] * 2 for rank in range(3)]
