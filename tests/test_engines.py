"""Real engines: their ranks, their order, their end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from subprocess import PIPE

import psutil
import pytest
from ipyparallel.error import EngineError
from jupyter_client import KernelManager

from refdist.lab import cluster
from refdist.lab.cluster import PROFILE, reserve_ports
from refdist.lab.engines import LocalEngines

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
    assert engines.view.apply_sync(os.getpid) == [
        engines.client[rank].apply_sync(os.getpid) for rank in range(3)
    ]


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
            assert set(engines.view.apply_sync(os.getpid)) < started
            assert engines.gather("rank") == [0, 1]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use_and_fail()
    assert started
    kept[0].stop()
    wait_until_gone(started, "alive after an error")
    assert repr(kept[0]) == "LocalEngines(n=2, stopped)"


# All that belongs to an owner has its TMPDIR, which it inherits.


@contextlib.contextmanager
def owner(folder, program, **environment):
    """A process that runs a program and has a folder for temporary files. It is killed at last."""
    env = os.environ | {"TMPDIR": str(folder)} | environment
    command = [sys.executable, "-c", "from refdist.lab.engines import LocalEngines\n" + program]
    with subprocess.Popen(
        command, stdin=PIPE, stdout=PIPE, text=True, env=env, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def owned(folder):
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(folder):
                found.append(process)
    return found


def wait_until(happened, what):
    end = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def wait_until_nothing_is_left(folder):
    wait_until(lambda: not owned(folder), "processes are left")
    assert sorted(path.name for path in folder.glob("refdist-*")) == []


@pytest.mark.parametrize("profile", [False, True], ids=["own folder", "profile"])
def test_engines_end_with_a_killed_owner(tmp_path, profile):
    # a notebook's kernel is killed and cannot stop its engines; one of them is stopped
    environment = {}
    if profile:
        (tmp_path / "profile").mkdir()
        (tmp_path / "profile" / "ipcluster_config.py").write_text("c = get_config()\n")
        environment = {PROFILE: str(tmp_path / "profile")}
    program = "import os; engines = LocalEngines(2)\n"
    program += "print(*engines.view.apply_sync(os.getpid), flush=True); input()"
    with owner(tmp_path, program, **environment) as process:
        first = psutil.Process(int(process.stdout.readline().split()[0]))
        assert len(owned(tmp_path)) >= 7  # owner, guard, controller, two engines and their nannies
        for process in (first, *first.children()):
            process.suspend()
    wait_until_nothing_is_left(tmp_path)
    assert (tmp_path / "profile").exists() == profile


@pytest.mark.parametrize(
    "started", ["engine_guard", "ipyparallel.controller", "ipyparallel.engine"]
)
def test_what_has_started_ends_with_an_owner_that_is_killed_meanwhile(tmp_path, started):
    def seen():
        for process in owned(tmp_path):
            with contextlib.suppress(psutil.Error):
                if any(started in word for word in process.cmdline()[1:4]):
                    return True
        return False

    with owner(tmp_path, "LocalEngines(4)"):
        wait_until(seen, f"no {started}")
    wait_until_nothing_is_left(tmp_path)


def test_the_guard_outlives_ctrl_c_and_does_not_wait_for_the_children_of_its_owner(tmp_path):
    # Ctrl-C goes to all of the owner's group; a forked child holds the pipe after the owner's death
    program = """
import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
engines = LocalEngines(1)
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, flush=True)
input()
print(engines.gather("rank"), flush=True)
input()
"""
    with owner(tmp_path, program) as process:
        child = psutil.Process(int(process.stdout.readline()))
        os.killpg(process.pid, signal.SIGINT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "[0]\n"
    try:
        wait_until(lambda: owned(tmp_path) == [child], "processes are left")
    finally:
        child.kill()
    wait_until_nothing_is_left(tmp_path)


def test_engines_end_when_nothing_refers_to_them(tmp_path):
    program = """
import os
for _ in range(2):
    engines = LocalEngines(1)
    print(*engines.view.apply_sync(os.getpid), flush=True)
    input()
"""
    with owner(tmp_path, program) as process:
        old = psutil.Process(int(process.stdout.readline()))
        process.stdin.write("\n")
        process.stdin.flush()
        new = psutil.Process(int(process.stdout.readline()))
        wait_until(lambda: not old.is_running(), "the old engine is left")
        assert new.is_running()
        assert len(list(tmp_path.glob("refdist-*"))) == 1
        process.stdin.close()  # an error, and an end without stop
        process.wait(DEADLINE)
        assert not owned(tmp_path)
    wait_until_nothing_is_left(tmp_path)


# An engine that has ended or is stopped: the error names it and says what helps.


def test_calls_name_the_engine_that_is_stopped_or_has_ended(monkeypatch):
    with LocalEngines(2) as engines:
        calls = [
            lambda: engines.run(divmod),
            lambda: engines.gather("rank"),
            lambda: engines.offer_port(rank=1),
            lambda: engines.view.execute("1", block=True),
            lambda: engines.client[1].apply_sync(os.getpid),
        ]
        engines.signal(1, signal.SIGSTOP)
        assert engines.answering() == [0]
        go_on = r"engine 1 is stopped\. Let it go on: engines\.signal\(1, signal\.SIGCONT\)"
        for call in calls:
            with pytest.raises(EngineError, match=go_on):
                call()
        engines.signal(1, signal.SIGCONT)
        assert engines.gather("rank") == [0, 1]
        first = engines.client[0].apply_sync(os.getpid)
        engines.signal(1, signal.SIGKILL)
        assert engines.answering() == [0]
        again = r"engine 1 has ended\. Start engines again: engines = LocalEngines\(2\)"
        calls.append(lambda: engines.signal(1, signal.SIGCONT))
        for call in calls:
            with pytest.raises(EngineError, match=again):
                call()
        engines.offer_port()  # the dead are not told
        assert engines.client[0].apply_sync(os.getpid) == first
        # without a nanny, there are no signals
        monkeypatch.setattr("refdist.lab.engines._NANNY_SECONDS", 0.3)
        for nanny in psutil.Process(first).children():
            nanny.kill()
        with pytest.raises(EngineError, match=r"engine 0: its nanny has not answered within 0\.3"):
            engines.signal(0, signal.SIGINT)
    with pytest.raises(EngineError, match="engine 0 has ended, engine 1 has ended"):
        engines.gather("rank")


def test_a_call_ends_with_an_engine_that_ends_meanwhile():
    def end(rank, world_size):
        import os
        import signal

        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    end.__module__ = "__main__"  # engines cannot import the tests
    with LocalEngines(2) as engines, pytest.raises(EngineError, match=r"^engine 1 has ended"):
        engines.run(end)


# A reader takes long until the cell that lets an engine go on. Without its own setting, the
# controller gives an engine up that has missed 10 heartbeats.


def test_an_engine_may_be_stopped_for_long(tmp_path, monkeypatch):
    (tmp_path / "ipcontroller_config.py").write_text("get_config().HeartMonitor.period = 100\n")
    monkeypatch.setattr(cluster.tempfile, "mkdtemp", lambda prefix: str(tmp_path))

    def missed(count):
        (log,) = tmp_path.glob("log/ipcontroller-*.log")
        return f" : {count}\n" in log.read_text()

    with LocalEngines(2) as engines:
        engines.signal(1, signal.SIGSTOP)
        wait_until(lambda: missed(12) or engines.state(1) == "has ended", "it misses no heartbeat")
        engines.signal(1, signal.SIGCONT)
        assert engines.gather("rank") == [0, 1]


# A real kernel runs cells.


class Notebook:
    def __init__(self, folder):
        self.manager = KernelManager()
        self.manager.start_kernel(
            env=os.environ | {"TMPDIR": str(folder)}, stderr=subprocess.DEVNULL
        )
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=DEADLINE)

    def run(self, cell):
        """The name and text of the cell's error, or what it printed and gave."""
        shown = []
        reply = self.client.execute_interactive(
            cell, timeout=DEADLINE, output_hook=lambda message: shown.append(message["content"])
        )["content"]
        if reply["status"] == "error":
            return reply["ename"], reply["evalue"]
        outputs = [one.get("data", {}).get("text/plain") or one.get("text", "") for one in shown]
        return "".join(outputs)

    def interrupt_when(self, happened, cell):
        def interrupt():
            wait_until(happened, "the cell does not run")
            self.manager.interrupt_kernel()

        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            return self.run(cell)
        finally:
            thread.join(DEADLINE)

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel()


@pytest.fixture
def notebook(tmp_path):
    started = Notebook(tmp_path)
    try:
        yield started
    finally:
        started.close()
        wait_until_nothing_is_left(tmp_path)


START = (
    "import os; from refdist.lab.engines import LocalEngines; engines = LocalEngines(2)\n"
    "print(*engines.view.apply_sync(os.getpid))"
)


def test_stop_interrupts_a_cell_and_its_engines(notebook, tmp_path):
    # both engines are in the cell, and say when; after the interrupt, the next cell runs
    notebook.run(START)
    entered = "import pathlib, time; pathlib.Path(f'{folder}/in-{rank}').touch(); time.sleep(600)"
    notebook.run(f"engines.view['folder'] = {str(tmp_path)!r}")

    def both():
        return len(list(tmp_path.glob("in-*"))) == 2

    assert notebook.interrupt_when(both, f"%%px\n{entered}")[0] == "KeyboardInterrupt"
    assert "Out[0:" in notebook.run("%%px\nrank + 10")
    for path in tmp_path.glob("in-*"):
        path.unlink()
    notebook.run(f"def wait(rank, world_size, folder): {entered}")
    call = f"engines.run(wait, {str(tmp_path)!r})"
    assert notebook.interrupt_when(both, call)[0] == "KeyboardInterrupt"
    assert notebook.run("engines.run(divmod)") == "[(0, 0), (0, 1)]"


def test_a_cell_says_that_an_engine_has_ended_and_new_engines_replace_the_old(notebook, tmp_path):
    # the cell shows the engines, and the next one has an error: IPython refers to both for good
    old = notebook.run(START + "\nengines").split("L")[0].split()
    notebook.run("import os, signal; engines.signal(1, signal.SIGKILL)")
    for cell in ("%%px\nrank", "%%px --targets 1:\nrank", "engines.gather('rank')"):
        name, text = notebook.run(cell)
        assert (name, text[:18]) == ("EngineError", "engine 1 has ended")
    assert "Out[0:" in notebook.run("%%px --targets 0\nrank + 10")
    new = notebook.run(START).split()
    assert notebook.run("%px print(os.getpid())")
    assert set(new).isdisjoint(old)
    wait_until(lambda: not any(psutil.pid_exists(int(pid)) for pid in old), "left")
    assert len(list(tmp_path.glob("refdist-*"))) == 1
    # another variable names engines: they stay
    notebook.run("others = engines")
    notebook.run(START)
    assert notebook.run("others.gather('rank')") == "[0, 1]"


def test_without_ipyparallel():
    program = "import sys; sys.modules['ipyparallel'] = None; import refdist.lab.engines"
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE
    )
    last = finished.stderr.splitlines()[-1]
    assert last == (
        "ModuleNotFoundError: refdist.lab.engines needs ipyparallel: pip install '.[notebooks]'"
    )


def test_n_must_be_positive():
    with pytest.raises(ValueError, match="n=0: must be at least 1"):
        LocalEngines(0)


# Clusters that start at the same time have ports of their own, which the system gives to nobody.


def test_each_cluster_has_its_own_ports():
    reserved, told = zip(*(reserve_ports() for _ in range(50)), strict=True)
    try:
        ends = [tuple(map(int, one.split("-"))) for one in told]
        ranges = [range(first, last + 1) for first, last in ends]
        ports = [port for one in ranges for port in one]
        assert len(ports) == len(set(ports)) == 50 * 19
        with socket.socket() as given:
            given.bind(("127.0.0.1", 0))
            assert max(ports) < given.getsockname()[1]
        for port in ranges[0]:
            with socket.socket() as free:
                free.bind(("127.0.0.1", port))
    finally:
        for one in reserved:
            one.close()
