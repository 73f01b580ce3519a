"""Checks of arguments: of numbers of seconds and of the length of a secret."""

import math
import os
import subprocess
import sys
import warnings
from datetime import timedelta

import pytest
from ranks import LOCAL, run_ranks

from refdist import InsecureGroupWarning, StatelessProcessGroup, create_tcp_store
from refdist.checks import MOST_SECONDS, check_seconds, wait_of
from refdist.store.seals import SHORTEST, VARIABLE, secret_from


@pytest.mark.parametrize("value", [0, 300, 0.5, -1, 1e9])
def test_seconds(value):
    assert check_seconds("x", value) == value
    assert type(check_seconds("x", value)) is float


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e10, 1e15, 10**400])
def test_seconds_that_are_not_finite_or_too_many(value):
    with pytest.raises(ValueError, match=r"^x=.*: must be finite seconds, at least 0, at most 1"):
        check_seconds("x", value)


@pytest.mark.parametrize("value", ["5", None, timedelta(seconds=5)])
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match=r"^x=.*: must be a number of seconds, not "):
        check_seconds("x", value)


# A group refuses them before it does anything else. Torch takes the longest that is let through.


@pytest.mark.parametrize("name", ["store_timeout", "data_expiration_seconds"])
@pytest.mark.parametrize("value", [math.nan, 1e10, 1e15])
def test_a_group_refuses_them(name, value):
    with pytest.raises(ValueError, match=f"^{name}=.*: must be finite seconds, at least 0"):
        StatelessProcessGroup.create(LOCAL, 0, 0, 1, **{name: value})


def _wait_for_long(here):
    with here.group(store_timeout=MOST_SECONDS / 2) as group:
        return group.all_gather_obj(here.rank)


def test_torch_takes_the_longest_time():
    assert run_ranks(_wait_for_long, 2) == [[0, 1]] * 2
    store = create_tcp_store(LOCAL, 0, is_master=True, timeout=timedelta(seconds=MOST_SECONDS / 2))
    store.set("key", "value")
    store.wait(["key"], timedelta(seconds=MOST_SECONDS))


def test_a_wait_is_never_for_ever():
    assert wait_of(-3) == wait_of(0) == wait_of(1e-6) == timedelta(milliseconds=1)
    assert wait_of(2.5) == timedelta(seconds=2.5)


# A short secret is taken, with a warning that does not show it.


@pytest.mark.parametrize("given", ["kiwi", b"kiwi", "kiwi" + "x" * (SHORTEST - 5)])
def test_a_short_secret(monkeypatch, given):
    with pytest.warns(InsecureGroupWarning) as caught:
        secret_from(given)
    (warning,) = caught
    assert str(warning.message).startswith("secret: is shorter than 16 bytes")
    assert "secrets.token_hex()" in str(warning.message) and "kiwi" not in str(warning.message)
    monkeypatch.setenv(VARIABLE, "kiwi")
    with pytest.warns(InsecureGroupWarning, match=f"^{VARIABLE}: is shorter"):
        secret_from(None)


def test_a_long_secret():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert secret_from("\u00e9" * 8) == ("\u00e9" * 8).encode()


def test_the_warning_of_a_short_secret_points_to_the_caller():
    with pytest.warns(InsecureGroupWarning, match="is shorter") as caught:
        StatelessProcessGroup.create(LOCAL, 0, 0, 1, secret="kiwi").close()
    assert caught[0].filename == __file__


# A child that is forked while other threads are in ``quiet``, or hold its lock, is not quiet, and
# can be.

_FORK = """
import os, signal, sys, threading
from refdist.store.client import quiet
from refdist.torch_versions import log_level

inside, leave = threading.Event(), threading.Event()

def wait_quietly():
    with quiet():
        if sys.argv[1] == "locked":
            quiet._lock.acquire()
        inside.set()
        leave.wait()
        if sys.argv[1] == "locked":
            quiet._lock.release()

thread = threading.Thread(target=wait_quietly)
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    levels = [log_level().value]
    with quiet():
        levels.append(log_level().value)
    levels.append(log_level().value)
    os.write(1, f"child {levels}\\n".encode())
    os._exit(0)
os.waitpid(child, 0)
during = log_level().value
leave.set()
thread.join()
print("parent", [during, log_level().value])
"""


@pytest.mark.parametrize("state", ["free", "locked"])
def test_quiet_in_a_forked_child(state):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_CPP_LOG")}
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORK, state],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert finished.stdout.splitlines() == ["child [1, 2, 1]", "parent [2, 1]"], finished.stderr
