"""Records of measurements: the machine, its links and versions; and their files."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, fields
from datetime import date
from pathlib import Path
from typing import Any

import torch

from refdist.benchmarks.allreduce import AllReduceTiming

_NVLINK_BYTES = {"H100": 25e9, "H200": 25e9, "A100": 25e9, "B200": 50e9}
"""Bytes a second that one NVLink carries each way, by NVIDIA's data sheets."""


def describe_machine() -> dict[str, str]:
    """The device, its links, the versions, and today's date."""
    machine = {
        "device": _processor(),
        "links": "loopback",
        "cores": str(os.cpu_count()),
        "machine": platform.machine(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
    if torch.cuda.is_available():
        nccl: Any = torch.cuda.nccl  # has no annotations
        machine |= {
            "device": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}",
            "links": _gpu_links(_ask_nvidia_smi("topo", "-m")),
            "cuda": str(torch.version.cuda),
            "nccl": ".".join(map(str, nccl.version())),
            "driver": _ask_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
            .partition("\n")[0]
            .strip(),
            "settings": " ".join(
                f"{name}={value}"
                for name, value in sorted(os.environ.items())
                if name.startswith(("NCCL_", "TORCH_NCCL_", "TORCH_SYMM"))
            ),
        }
    return machine


def link_bandwidth(machine: dict[str, str]) -> float | None:
    """Bytes a second that a GPU's links carry each way by the data sheet; None if unknown.

    Args:
        machine: from ``describe_machine``; its ``"links"`` are ``"NV18"`` for 18 NVLinks.
    """
    links = machine["links"].removeprefix("NV")
    per_link = [rate for name, rate in _NVLINK_BYTES.items() if name in machine["device"]]
    return int(links) * per_link[0] if links.isdigit() and per_link else None


def to_record(timing: AllReduceTiming, machine: dict[str, str]) -> dict[str, Any]:
    """The content of one JSON line: the timing, both bandwidths, and the machine."""
    bandwidths = {
        "algorithm_bandwidth": timing.algorithm_bandwidth,
        "bus_bandwidth": timing.bus_bandwidth,
    }
    return {"benchmark": "allreduce"} | asdict(timing) | bandwidths | machine


def append_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append records to a file, one JSON object a line."""
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read_timings(path: Path) -> tuple[list[AllReduceTiming], dict[str, str]]:
    """The timings of all-reduce in a file that the benchmark wrote, and their machine.

    Raises:
        ValueError: the file has no timings, or several machines, versions, settings or dates.
    """
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records = [record for record in records if record["benchmark"] == "allreduce"]
    names = [field.name for field in fields(AllReduceTiming)]
    timings = [AllReduceTiming(**{name: record[name] for name in names}) for record in records]
    about = {*names, "benchmark", "algorithm_bandwidth", "bus_bandwidth"}
    machines = [{k: v for k, v in record.items() if k not in about} for record in records]
    if not machines or any(machine != machines[0] for machine in machines):
        raise ValueError(f"{path.name}: must hold timings of one machine, and holds {len(records)}")
    return timings, machines[0]


def _gpu_links(topology: str) -> str:
    """The link between GPU 0 and 1, from ``nvidia-smi topo -m``: ``NV18`` is 18 NVLinks."""
    for line in topology.splitlines():
        cells = line.split()
        if cells[:2] == ["GPU0", "X"] and len(cells) > 2:
            return cells[2]
    return "unknown"


def _ask_nvidia_smi(*arguments: str) -> str:
    try:
        finished = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return finished.stdout


def _processor() -> str:
    """The processor's name, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
