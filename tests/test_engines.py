"""Real engines: their ranks, their order, their end."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from refdist.engines import LocalEngines

DEADLINE = 60.0


def descendants():
    return {process.pid for process in psutil.Process().children(recursive=True)}


def wait_until_gone(pids, what):
    _, alive = psutil.wait_procs(
        [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=DEADLINE
    )
    assert not alive, f"{what}: {alive}"


@pytest.fixture(scope="module")
def engines():
    with LocalEngines(3) as started:
        yield started


def test_ranks_are_ids_and_results_come_in_rank_order(engines):
    assert engines.gather("rank") == [0, 1, 2]
    assert engines.gather("world_size") == [3, 3, 3]
    assert engines.run(divmod) == [(0, 0), (0, 1), (0, 2)]  # of rank and world size
    assert engines.view.apply_sync(os.getpid) == engines.pids


def test_offers_a_new_port_for_each_group(engines):
    ports = [engines.gather("port")]
    engines.offer_port()
    ports.append(engines.gather("port"))
    assert all(len(set(port)) == 1 for port in ports)
    assert ports[0] != ports[1]


def test_engines_form_a_group(engines):
    engines.offer_port()
    engines.view.execute(
        textwrap.dedent("""
        from refdist import StatelessProcessGroup
        with StatelessProcessGroup.create(
            "127.0.0.1", port, rank, world_size, listen_socket=listen_socket
        ) as group:
            gathered = group.all_gather_obj(rank)
        """),
        block=True,
    )
    assert engines.gather("gathered") == [[0, 1, 2]] * 3


def test_an_interrupted_engine_goes_on(engines):
    # rank 1 waits for a message that nobody sends; SIGINT ends the wait and not the engine
    engines.offer_port()
    engines.view.execute(
        "from refdist import StatelessProcessGroup\n"
        "group = StatelessProcessGroup.create("
        "'127.0.0.1', port, rank, world_size, listen_socket=listen_socket)\n"
        "waiting = False",
        block=True,
    )
    waiting = engines.client[1].execute(
        # the interrupt may come as early as in the first call
        "try:\n    group.send_obj('waiting', 0)\n    group.recv_obj(0)\n"
        "except KeyboardInterrupt:\n    ended_by = 'SIGINT'"
    )
    engines.client[0].execute("told = group.recv_obj(1)", block=True)
    assert engines.client[0]["told"] == "waiting"
    engines.signal(1, signal.SIGINT)
    waiting.get(timeout=DEADLINE)
    assert engines.client[1]["ended_by"] == "SIGINT"
    engines.view.execute("group.barrier(timeout=30)", block=True)


def test_stops_engines_that_are_stopped_or_killed():
    # rank 0 is frozen and rank 1 is dead when stop is called
    before = descendants()
    engines = LocalEngines(2)
    started = descendants() - before
    engines.signal(0, signal.SIGSTOP)
    engines.signal(1, signal.SIGKILL)
    engines.stop()
    wait_until_gone(started, "alive after stop")


def test_nothing_is_left_when_the_body_raises_and_after_another_stop():
    before = descendants()
    started = set()
    kept = []

    def use_and_fail():
        with LocalEngines(2) as engines:
            kept.append(engines)
            started.update(descendants() - before)
            assert set(engines.pids) < started
            assert engines.gather("rank") == [0, 1]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use_and_fail()
    assert started
    kept[0].stop()
    wait_until_gone(started, "alive after an error")
    assert repr(kept[0]) == "LocalEngines(n=2, stopped)"


def test_engines_end_with_the_process_that_started_them():
    # a notebook's kernel is killed and cannot stop its engines
    program = "from refdist.engines import LocalEngines; print(LocalEngines(1).pids, flush=True)"
    owner = subprocess.Popen(
        [sys.executable, "-c", program + "; import time; time.sleep(600)"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stdout.readline().startswith("[")
        started = {process.pid for process in psutil.Process(owner.pid).children(recursive=True)}
        assert started
    finally:
        owner.kill()
        owner.wait(DEADLINE)
    until = time.monotonic() + DEADLINE
    while any(psutil.pid_exists(pid) for pid in started) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for pid in started if psutil.pid_exists(pid)]


def test_n_must_be_positive():
    with pytest.raises(ValueError, match="n=0: must be at least 1"):
        LocalEngines(0)
