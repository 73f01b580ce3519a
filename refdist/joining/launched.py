"""Where a rank belongs, told by the program that started it: torchrun, mpirun or srun.

==========  ======================================  =====================================
started by  rank and world size                     host, where MASTER_ADDR does not say it
==========  ======================================  =====================================
torchrun    RANK, WORLD_SIZE                        (torchrun always sets MASTER_ADDR)
mpirun      OMPI_COMM_WORLD_RANK, ..._SIZE          127.0.0.1, if all ranks are on one host
srun        SLURM_PROCID, SLURM_STEP_NUM_TASKS      the first of SLURM_STEP_NODELIST
            or SLURM_NTASKS                         or SLURM_JOB_NODELIST
==========  ======================================  =====================================

The first of them that has set both counts: torchrun and mpirun may run under srun, and then it is
they who number the ranks.

The port is REFDIST_PORT. Without it, it is MASTER_PORT + 1, because torchrun's own store listens on
MASTER_PORT. Without that too, it is one of 15000..24999 that follows from the name of the job, so
that jobs that share a host rarely meet. Groups that live at the same time need a port each.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from refdist.checks import check_integer, check_rank

_COUNTED_BY = {
    "torchrun": (["RANK"], ["WORLD_SIZE"]),
    "mpirun": (["OMPI_COMM_WORLD_RANK"], ["OMPI_COMM_WORLD_SIZE"]),
    "srun": (["SLURM_PROCID"], ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"]),
}
_NODES = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"]
_JOB_PORTS = range(15000, 25000)


@dataclass(frozen=True)
class Place:
    """The place of one rank in a group, and in words, where its address comes from."""

    host: str
    port: int
    rank: int
    world_size: int
    origin: str

    def explain(self, error: Exception) -> None:
        """Add to the text of an error where host and port come from."""
        if isinstance(error, OSError):
            error.strerror = f"{error.strerror}; {self.origin}"
        else:
            error.args = (f"{error}; {self.origin}", *error.args[1:])


def find_place(
    environment: Mapping[str, str],
    host: str | None = None,
    port: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> Place:
    """The place that the variables of ``environment`` tell. Arguments take precedence over them.

    Raises:
        ValueError: a variable is missing, has another form than it should, or is out of its range.
    """
    set_here = {name: value for name, value in environment.items() if value}
    launcher = next((name for name in _COUNTED_BY if _counts(name, set_here)), None)
    if rank is None or world_size is None:
        if launcher is None:
            raise ValueError(_nobody_counts(set_here))
        of_rank, of_size = (_first(names, set_here) for names in _COUNTED_BY[launcher])
        rank = _integer(of_rank, set_here) if rank is None else rank
        world_size = _integer(of_size, set_here) if world_size is None else world_size
        rank = check_rank(rank, world_size, of_rank, of_size)
    else:
        rank = check_rank(rank, world_size)
    world_size = check_integer("world_size", world_size)
    host, of_host = (host, "given") if host else _host(launcher, set_here)
    port, of_port = (port, "given") if port is not None else _port(launcher, set_here)
    if "TORCHELASTIC_RUN_ID" in set_here and str(port) == set_here.get("MASTER_PORT"):
        raise ValueError(
            f"port={port}: is {of_port}, but also MASTER_PORT, where torchrun's own store listens"
        )
    origin = f"host={host!r} is {of_host}, port={port} is {of_port}"
    if of_port != "given":
        origin += "; for another, set REFDIST_PORT on all ranks"
    return Place(host, port, rank, world_size, origin)


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: ``node[07-09,12],login`` begins with node07.

    Raises:
        ValueError: it is no such list.
    """
    host = re.match(r"(?:[\w.-]|\[\w+(?:-\w+)?(?:,\w+(?:-\w+)?)*\])+(?=,|$)", nodes)
    if host is None:
        raise ValueError(f"{nodes!r}: is no list of hosts such as 'node[01-03,7],login'")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", host[0])


def _counts(launcher: str, set_here: Mapping[str, str]) -> bool:
    return all(any(name in set_here for name in names) for names in _COUNTED_BY[launcher])


def _first(names: list[str], set_here: Mapping[str, str]) -> str:
    return next(name for name in names if name in set_here)


def _nobody_counts(set_here: Mapping[str, str]) -> str:
    found, needed = [], []
    for launcher, groups in _COUNTED_BY.items():
        needed.append(f"{' and '.join(' or '.join(names) for names in groups)} ({launcher})")
        found += [
            f"{name}={set_here[name]}" for names in groups for name in names if name in set_here
        ]
    return (
        f"rank and world size are unknown. Found: {', '.join(found) or 'nothing'}. Needed: "
        f"{', or '.join(needed)}; or give rank= and world_size="
    )


def _host(launcher: str | None, set_here: Mapping[str, str]) -> tuple[str, str]:
    """A host that all ranks reach, and where it comes from."""
    if "MASTER_ADDR" in set_here:
        return set_here["MASTER_ADDR"], "MASTER_ADDR"
    if launcher == "srun" and any(name in set_here for name in _NODES):
        name = _first(_NODES, set_here)
        try:
            return first_host(set_here[name]), f"the first of {name}={set_here[name]}"
        except ValueError as error:
            raise ValueError(f"{name}={error}") from None
    rule = "set it to an address of rank 0's machine, or give host="
    if launcher == "mpirun":
        on_this, in_all = "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE"
        if set_here.get(on_this) == set_here[in_all]:
            return "127.0.0.1", f"this machine, because {on_this} is {in_all}"
        rule = (
            f"{on_this}={set_here.get(on_this)} of {in_all}={set_here[in_all]} ranks are here; "
            f"{rule} (mpirun -x MASTER_ADDR=...)"
        )
    raise ValueError(f"MASTER_ADDR: is missing; {rule}")


def _port(launcher: str | None, set_here: Mapping[str, str]) -> tuple[int, str]:
    """A port, and where it comes from."""
    if "REFDIST_PORT" in set_here:
        port, source = _integer("REFDIST_PORT", set_here), "REFDIST_PORT"
    elif "MASTER_PORT" in set_here:
        master = _integer("MASTER_PORT", set_here)
        port, source = master + 1, f"MASTER_PORT={master} plus 1, as torchrun's store has that"
    else:
        job = _job(launcher, set_here)
        port = _JOB_PORTS[zlib.crc32(job.encode()) % len(_JOB_PORTS)]
        source = f"from the job's name, {job}"
    if not 1 <= port <= 65535:
        raise ValueError(f"port={port}: is {source}; must be in 1..65535, so set REFDIST_PORT")
    return port, source


def _job(launcher: str | None, set_here: Mapping[str, str]) -> str:
    """A text that only the ranks of this job have in common."""
    if launcher == "mpirun" and "PMIX_NAMESPACE" in set_here:
        return f"PMIX_NAMESPACE={set_here['PMIX_NAMESPACE']}"
    if launcher == "srun" and "SLURM_JOB_ID" in set_here:
        step = set_here.get("SLURM_STEP_ID", "0")
        return f"SLURM_JOB_ID={set_here['SLURM_JOB_ID']}, SLURM_STEP_ID={step}"
    raise ValueError(
        "REFDIST_PORT: is missing, and so is MASTER_PORT; set one of them on all ranks, or give "
        "port="
    )


def _integer(name: str, set_here: Mapping[str, str]) -> int:
    try:
        return int(set_here[name])
    except ValueError:
        raise ValueError(f"{name}={set_here[name]!r}: must be an integer") from None
