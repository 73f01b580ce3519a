"""What one call costs its reader: calls into the package, modules, and depth of the stack."""

import sys
from pathlib import Path

import pytest
from ranks import run_ranks

import refdist
from refdist import torch_versions

PACKAGE = Path(refdist.__file__).parent

# calls, modules and depth of one complete call of two ranks; a barrier takes 19 on rank 1, and 21
# on a rank 0 that has to wait for it
LIMITS = {"barrier": (21, 6, 7), "recv_obj": (24, 7, 8), "all_gather_obj": (38, 9, 9)}


class Profile:
    """Counts the calls into the package while it is entered."""

    def __enter__(self):
        self.calls, self.deepest, self._depth = [], 0, 0
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _note(self, frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or PACKAGE not in path.parents:
            return
        self._depth += 1 if event == "call" else -1
        self.deepest = max(self.deepest, self._depth)
        if event == "call":
            self.calls.append((str(path.relative_to(PACKAGE)), frame.f_code.co_name))


def _count(here, name):
    methods = {
        "barrier": lambda group: group.barrier,
        "recv_obj": lambda group: lambda: group.recv_obj(0),
        "all_gather_obj": lambda group: lambda: group.all_gather_obj(here.rank),
    }
    with here.group() as group:
        call, counted = methods[name](group), []
        for number in range(10):
            if name == "recv_obj" and here.rank == 0:
                group.send_obj(number, 1)
            here.meet(f"sent {number}")
            if name == "recv_obj" and here.rank == 0:
                continue
            with Profile() as profile:
                call()
            # a call may also set a new limit of the socket, as the first does
            calls = [one for one in profile.calls if not one[1].startswith("limit")]
            modules = {module for module, _ in calls}
            counted.append((len(calls), len(modules), profile.deepest, calls))
        # a slow machine may put a rank to sleep
        return min(counted, default=None)


@pytest.mark.skipif(
    not torch_versions.store_features()[torch_versions.STORE_BARRIER],
    reason="this torch has no Store.barrier",
)
@pytest.mark.parametrize("name", LIMITS)
def test_calls_into_the_package(name):
    for found in filter(None, run_ranks(_count, 2, name)):
        *counted, calls = found
        assert all(one <= most for one, most in zip(counted, LIMITS[name], strict=True)), calls


# The modules that README sends a reader to stay short.


@pytest.mark.parametrize(
    ("files", "most"), [("barrier/plain.py", 150), ("barrier/*.py", 455), ("group.py", 350)]
)
def test_lengths(files, most):
    assert sum(len(path.read_text().splitlines()) for path in PACKAGE.glob(files)) <= most
