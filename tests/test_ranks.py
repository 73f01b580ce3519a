"""The tests' own way to run ranks: it must not hide a rank that fails, dies or hangs."""

import os
import re
import signal
import threading

import pytest
from ranks import RankFailedError, run_ranks, run_threads


def _say_rank(here, word):
    here.meet("everyone is here")
    return word, here.rank, os.getpid()


def test_results_come_in_rank_order_from_separate_processes():
    results = run_ranks(_say_rank, 4, "hello")
    assert [(word, rank) for word, rank, _ in results] == [("hello", rank) for rank in range(4)]
    assert len({os.getpid(), *(process for _, _, process in results)}) == 5


def _misbehave(here, how):
    if here.rank != 1:
        return "fine"
    if how == "raises":
        raise KeyError("on rank 1")
    if how == "exits":
        os._exit(3)
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "returns a lock":
        return threading.Lock()
    if how == "hangs":
        signal.pause()
    return "fine"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", r"_misbehave\n.*KeyError: 'on rank 1'"),
        ("exits", "no answer; exit code 3"),
        ("is killed", "no answer; exit code -9"),
        ("returns a lock", "TypeError: cannot pickle"),
        ("hangs", "no answer; exit code -9"),
    ],
)
def test_a_rank_that_does_not_return_is_named(how, said):
    # the first process of all takes seconds to start; not in the time of the one that hangs
    run_ranks(_say_rank, 3, "hello")
    text = rf"(?s)^_misbehave\n--- rank 1 of 3 ---\n.*{said}"
    with pytest.raises(RankFailedError, match=text) as caught:
        run_ranks(_misbehave, 3, how, deadline=4)
    assert not re.search("--- rank [02]", str(caught.value))


def test_a_rank_that_should_be_killed():
    assert run_ranks(_misbehave, 3, "is killed", killed=[1]) == ["fine", None, "fine"]
    with pytest.raises(RankFailedError, match="--- rank 1 of 3 ---"):
        run_ranks(_misbehave, 3, "returns", killed=[1])


def _thread(rank, word):
    if word == "fail" and rank == 1:
        raise KeyError("on rank 1")
    return word, rank


def test_threads():
    assert run_threads(_thread, 3, "hello") == [("hello", rank) for rank in range(3)]
    with pytest.raises(KeyError, match="on rank 1"):
        run_threads(_thread, 3, "fail")
