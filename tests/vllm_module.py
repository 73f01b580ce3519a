"""Makes vLLM's own ``vllm.distributed.utils`` importable for tests: ``make peers``.

Nothing of vLLM is part of this project, and vLLM itself needs gigabytes and a GPU. Each version's
source distribution is tens of megabytes, and the files that tests run against import only a few
others of vLLM. So those files are fetched into ``build/vllm/VERSION/vllm``, which git ignores, and
the few others are the stand-ins below, which are of this project.

In a test module: ``@needs_vllm("0.33.0")`` on a test, or ``@pytest.mark.parametrize("version",
each_version())``. In a process of its own, such as a rank: ``utils = import_vllm(version)``.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDERS = Path(__file__).parent.parent / "build" / "vllm"

UTILS = "distributed/utils.py"
PACKED = "distributed/weight_transfer/packed_tensor.py"
PYNCCL = "distributed/device_communicators/pynccl.py"
PYNCCL_WRAPPER = "distributed/device_communicators/pynccl_wrapper.py"
NEWEST = "0.33.0"
FILES = {
    "0.9.0": [UTILS],
    "0.19.0": [UTILS],
    "0.27.0": [UTILS],
    NEWEST: [UTILS, PACKED, PYNCCL, PYNCCL_WRAPPER],
}
"""The files of vLLM itself, by version; paths are relative to its package."""

FIRST_BYTE_SECONDS = 45.0
"""How long a package index may take until a download begins. pip may try several addresses."""
FETCH_SECONDS = 300.0

STAND_INS = {
    "__init__.py": "",
    "config.py": '''
def get_current_vllm_config_or_none():
    """No configuration is ever set."""
    return None
''',
    "distributed/__init__.py": "",
    "distributed/device_communicators/__init__.py": "",
    "distributed/weight_transfer/__init__.py": "",
    "envs.py": '''
"""Environment variables by name; None for one that is not set."""
import os


def __getattr__(name):
    if not name.isupper():
        raise AttributeError(name)
    return os.environ.get(name)
''',
    "logger.py": '''
"""Loggers of the standard library. What is to be logged once is logged each time."""
import logging


def init_logger(name):
    logger = logging.getLogger(name)
    for level in ("debug", "info", "warning"):
        log = getattr(logger, level)
        setattr(logger, f"{level}_once", lambda text, *values, log=log, **_: log(text, *values))
    return logger
''',
    "platforms.py": '''
"""CUDA if torch has it, else none."""
import torch


class _Platform:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"

    def is_cuda(self):
        return torch.cuda.is_available() and torch.version.hip is None

    is_cuda_alike = is_cuda

    def fp8_dtype(self):
        return torch.float8_e4m3fn

    def __getattr__(self, name):
        if name.startswith("is_"):  # every other platform
            return lambda: False
        raise AttributeError(name)


current_platform = _Platform()
''',
    "utils/__init__.py": '''
"""What older versions import from here."""
import torch

from vllm.utils.network_utils import get_tcp_uri


def is_torch_equal_or_newer(version):
    return torch.__version__ >= torch.torch_version.TorchVersion(version)
''',
    "utils/nccl.py": '''
"""The library that torch has loaded already."""
import os


def find_nccl_library():
    return os.environ.get("VLLM_NCCL_SO_PATH") or "libnccl.so.2"
''',
    "utils/network_utils.py": """
def get_tcp_uri(ip, port):
    return f"tcp://[{ip}]:{port}" if ":" in ip else f"tcp://{ip}:{port}"
""",
    "utils/system_utils.py": '''
"""Output is left as it is."""
from contextlib import nullcontext as suppress_stdout
''',
    "utils/torch_utils.py": """
import torch


def current_stream():
    return torch.cuda.current_stream()
""",
}
"""Text of the modules that those files import, by path in vLLM's package."""


def folder(version: str) -> Path | None:
    """The folder to put into ``sys.path`` for this version of vLLM; None if it is not fetched."""
    place = FOLDERS / version
    return place if _has_files(place, version) and not _outdated(place) else None


def needs_vllm(version: str) -> pytest.MarkDecorator:
    """A mark that skips a test where this version is not fetched."""
    return pytest.mark.skipif(
        folder(version) is None, reason=f"vLLM {version} is not fetched: make peers"
    )


def each_version() -> list[Any]:
    """Values for ``pytest.mark.parametrize``. Each is skipped where it is not fetched."""
    return [pytest.param(version, marks=needs_vllm(version)) for version in FILES]


def import_vllm(version: str) -> ModuleType:
    """Import and return ``vllm.distributed.utils`` of a version that is fetched.

    Its other modules can be imported by name after that. A process can have one version.
    """
    place = folder(version)
    if place is None:
        raise RuntimeError(f"vLLM {version} is not fetched: make peers")
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
    module = importlib.import_module("vllm.distributed.utils")
    if not Path(str(module.__file__)).is_relative_to(place):
        raise RuntimeError(
            f"vLLM {version}: this process has {module.__file__} already; "
            f"import each version in a process of its own"
        )
    return module


def fetch(version: str) -> str:
    """Make ``folder(version)``, unless it is there. Returns an empty string, or why it failed."""
    place = FOLDERS / version
    if not _has_files(place, version):
        FOLDERS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDERS, prefix=f".{version}-") as work:
            source, reason = _unpacked_source(version, Path(work))
            if source is None:
                return reason
            lacking = [name for name in FILES[version] if not (source / name).is_file()]
            if lacking:
                return f"its source distribution lacks {', '.join(lacking)}"
            new = Path(work, "complete")
            for name in FILES[version]:
                _write(new / "vllm" / name, (source / name).read_text())
            shutil.rmtree(place, ignore_errors=True)
            try:
                new.rename(place)
            except OSError:
                if not _has_files(place, version):  # or else another process was faster
                    raise
    for name in _outdated(place):
        _write(place / "vllm" / name, STAND_INS[name])
    return ""


def _has_files(place: Path, version: str) -> bool:
    return all((place / "vllm" / name).is_file() for name in FILES[version])


def _outdated(place: Path) -> list[str]:
    """The stand-ins that are not there as they are above."""
    paths = {name: place / "vllm" / name for name in STAND_INS}
    return [
        name
        for name, path in paths.items()
        if not path.is_file() or path.read_text() != STAND_INS[name]
    ]


def _write(path: Path, text: str) -> None:
    """Write a file such that a process which reads it meanwhile sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}-{os.getpid()}")
    new.write_text(text)
    new.replace(path)


def _unpacked_source(version: str, work: Path) -> tuple[Path | None, str]:
    """The folder ``vllm`` of the source distribution, below ``work``; or None, and why not.

    pip unpacks a source distribution in order to ask it for its metadata. Here it stops before
    it runs any code of it, because what vLLM needs to be built is not installed; and it leaves
    the files, because of ``--no-clean``.
    """
    command = [sys.executable, "-m", "pip", "download", f"vllm=={version}", "--no-deps"]
    command += ["--no-binary=vllm", "--no-build-isolation", "--check-build-dependencies"]
    command += ["--ignore-requires-python", "--no-clean", f"--dest={work}", "--retries=1"]
    command += ["--timeout=15", "--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    log = work / "pip.log"
    environment = {**os.environ, "TMPDIR": str(work)}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as pip,
    ):
        reason = _wait(pip, log)
    source = next(work.glob(f"**/vllm/{UTILS}"), None)
    if source is None or reason:
        lines = log.read_text().splitlines()
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        return None, reason or (errors or ["pip unpacked no source"])[0]
    return source.parent.parent, ""


def _wait(pip: "subprocess.Popen[bytes]", log: Path) -> str:
    """Wait for pip. Returns an empty string, or why it was ended."""
    start = time.monotonic()
    while pip.poll() is None:
        begun = b"vllm-" in log.read_bytes()  # the name of the file that it downloads
        allowed = FETCH_SECONDS if begun else FIRST_BYTE_SECONDS
        if time.monotonic() - start > allowed:
            pip.kill()
            return f"no package index sent it within {allowed:.0f} s"
        with suppress(subprocess.TimeoutExpired):
            pip.wait(0.5)
    return ""


def main() -> int:
    """Fetch every version, and say which are there. Returns 0 if all are."""
    with ThreadPoolExecutor(len(FILES)) as pool:
        reasons = dict(zip(FILES, pool.map(fetch, FILES), strict=True))
    fetched = [version for version, reason in reasons.items() if not reason]
    if fetched:
        print(f"vLLM's module: fetched {', '.join(fetched)}")
    for version, reason in reasons.items():
        if reason:
            print(f"vLLM's module {version}: not fetched: {reason}")
    return int(len(fetched) < len(FILES))


if __name__ == "__main__":
    sys.exit(main())
