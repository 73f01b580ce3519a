"""Run every check of the project, each whatever the others say, and print one summary."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = [sys.executable, "-m"]

CHECKS = {
    "lint": [*PYTHON, "ruff", "check", "."],
    "format": [*PYTHON, "ruff", "format", "--check", "."],
    "types": [*PYTHON, "mypy"],
    # -E reads every page again, or a second run would not repeat the warnings of the first
    "pages": [*PYTHON, "sphinx", "-c", "docs", "-E", "-W", "-q", ".", "build/docs"],
    # most tests wait, for a timeout or another rank, so several run at once
    "tests": [*PYTHON, "pytest", "-n6", "--dist=loadgroup", "tests"],
    "notebooks": [
        *PYTHON,
        "pytest",
        "--nbval",
        "--timeout=0",  # nbval has a deadline for each cell
        "-n2",  # engines start, and ranks wait, for most of the time
        "notebooks",
    ],
}


def main() -> int:
    """Returns 0 if every check passed."""
    # thousands of short processes would each compile the tests and the package again
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # matplotlib's cache of fonts names files of one environment, which may be gone
    os.environ["MPLCONFIGDIR"] = str(ROOT / "build" / "matplotlib")
    print("== peers: what tests run against; those that it lacks are skipped", flush=True)
    subprocess.run([sys.executable, "tests/vllm_module.py"], cwd=ROOT, check=False)
    # from here on, no name server is asked, as in tests/conftest.py; engines inherit this
    os.environ.setdefault("RES_OPTIONS", "attempts:0")
    results = []
    for name, command in CHECKS.items():
        print(f"== {name}: {' '.join(command[2:])}", flush=True)
        start = time.monotonic()
        passed = subprocess.run(command, cwd=ROOT, check=False).returncode == 0
        results.append((name, passed, time.monotonic() - start))
    print("== summary")
    for name, passed, seconds in results:
        print(f"{name:10} {'passed' if passed else 'FAILED':7} {seconds:6.1f} s")
    failed = sum(not passed for _, passed, _ in results)
    print(f"checks: {len(results) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
