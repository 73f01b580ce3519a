"""Help where people are: the names that are shown, ``python -m refdist``, and command lines."""

import importlib
import json
import os
import pydoc
import re
import rlcompleter
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import refdist.exploration
import refdist.lab.figures
import refdist.nccl
import refdist.weights
from refdist import torch_versions
from refdist.__main__ import TESTED, VARIABLES, look
from refdist.command_line import run

ROOT = Path(__file__).parent.parent

# Only public names are shown by help and tab completion, though modules of the implementation are
# attributes of the package too.

SHOWN = {
    "refdist": """
        AuthenticationError BarrierError CollectiveError ConcurrentCallError GroupCreationError
        InsecureGroupWarning MessageError MessageExpiredError MessageTimeoutError PhaseEvent
        StatelessProcessGroup StoreConnectionError USE_SCHED_YIELD cpu_all_reduce_ create_tcp_store
        divide ensure_divisibility get_cached_tcp_store_client get_pp_indices
        init_gloo_process_group is_weak_contiguous sched_yield split_tensor_along_last_dim
        stateless_destroy_torch_distributed_process_group
        stateless_init_torch_distributed_process_group verify_group_size_divides_partition
        barrier exploration lab nccl pipeline torch_groups weights""",
    "refdist.barrier": "barrier_of plain quick roll",
    "refdist.exploration": """
        BARRIER REFDIST_BARRIER Call Counterexample Event Exploration Property Protocol RefdistWords
        Snapshot Timeline Words agreement each_is_in_its_group everyone_is_woken explore
        new_group_works next_call_works no_key_stays no_latecomer_passes nobody_else_is_told
        nobody_returns_early nobody_waits_for_ever nothing_old_is_received one_group_follows
        one_reason rank_0_leaves_last replay who_is_left_out_is_told within""",
    "refdist.lab.figures": """
        all_reduce_times all_reduce_ways attack_times barrier_timeline buckets_over_time call_grid
        cost_of_barriers keys_over_time memberships memory_of_stages pipeline_timeline remainder_map
        ring_steps schedule size_name times_over_ranks waits_of_hosts""",
    "refdist.nccl": "NcclCommunicator new_unique_id_bytes",
    "refdist.pipeline": """
        DEVICES MODELS OBJECTIVES PARTITION_VARIABLE RULES Assessment BestPartition Device
        GroupedQueryAttention LatentAttention Model Rule Serving assess best_partition compare
        faults find_device find_model get_pp_indices own_count_times_rank table""",
    "refdist.torch_groups": "collectives",
    "refdist.weights": """
        BUFFER_BYTES NamedTensors WeightMeta agree describe receive_into receive_weights
        send_weights""",
}
each_package = pytest.mark.parametrize("name", SHOWN)


def shown(names):
    # other tests may have imported the benchmarks
    return {name for name in names if not name.startswith("__")} - {"benchmarks"}


@each_package
def test_names_that_are_shown(name):
    assert shown(dir(sys.modules[name])) == set(SHOWN[name].split())
    completer, found = rlcompleter.Completer({"refdist": refdist}), []
    while (text := completer.complete(f"{name}.", len(found))) is not None:
        found.append(text.removeprefix(f"{name}.").rstrip("()"))
    assert shown(found) == set(SHOWN[name].split())


@pytest.mark.parametrize("use_jedi", [True, False])
@each_package
def test_names_that_a_notebook_shows(name, use_jedi):
    completer = pytest.importorskip("IPython.core.completer")
    ours = completer.IPCompleter(namespace={"refdist": refdist}, use_jedi=use_jedi)
    with completer.provisionalcompleter():
        found = [c.text.lstrip(".") for c in ours.completions(f"{name}.", len(name) + 1)]
    assert shown(found) == set(SHOWN[name].split())


@pytest.mark.parametrize("name", ["refdist", "refdist.nccl", "refdist.pipeline", "refdist.weights"])
def test_help_describes_public_names_alone(name):
    module = sys.modules[name]
    text = pydoc.plain(pydoc.render_doc(module))
    described = set(re.findall(r"^    (?:class )?(\w+)\(", text, re.MULTILINE))
    described |= set(re.findall(r"^    (\w+) = ", text, re.MULTILINE))
    assert described == {n for n in module.__all__ if hasattr(module, n)}


# python -m refdist: what this machine can do. The group that it forms is a real one.


def run_command(command, capsys):
    """Run a line such as ``python -m refdist --json``. Its exit status, stdout and stderr."""
    python, option, module, *arguments = shlex.split(command)
    assert (python, option) == ("python", "-m")
    if not module.endswith(".learn"):
        module += ".__main__"
    status = 0
    try:
        importlib.import_module(module).main(arguments)
    except SystemExit as ended:
        status = int(ended.code or 0)
    return status, *capsys.readouterr()


def test_what_this_machine_can_do(capsys, monkeypatch):
    monkeypatch.setenv("REFDIST_SECRET", "a long secret of this test")
    monkeypatch.setenv("REFDIST_SECRTE", "another secret of this test")
    status, out, err = run_command("python -m refdist", capsys)
    assert (status, err) == (0, "") and "secret of this test" not in out
    assert 18 <= len(out.splitlines()) <= 28 and max(map(len, out.splitlines())) <= 100
    assert f"torch {torch.__version__} (in the range tested: 2.6 to 2.15)" in " ".join(out.split())
    assert re.search(r"a group +of one rank formed in .* ms, and passed a barrier in .* ms", out)
    assert "REFDIST_SECRET (is set)" in out and "REFDIST_SECRTE (refdist reads no such" in out
    status, out, err = run_command("python -m refdist --json", capsys)
    assert (status, err) == (0, "") and "gloo" in json.loads(out)["torch groups"]


def test_no_group_forms(capsys, monkeypatch):
    monkeypatch.setenv("REFDIST_SECRET", "")
    status, out, _ = run_command("python -m refdist", capsys)
    assert status == 1
    assert "DOES NOT FORM here: ValueError: REFDIST_SECRET='': must not be empty" in out


def test_a_process_that_was_started_as_a_rank(monkeypatch):
    monkeypatch.delenv("REFDIST_PORT", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "started by torchrun, but from_env fails: MASTER_ADDR: is" in look()["this process"]
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert look()["this process"].startswith("is rank 1 of 2, says torchrun; host='node1' is")


def test_the_barrier_of_an_old_torch():
    with torch_versions.switched_off(torch_versions.STORE_BARRIER):
        found = look()
    assert found["barrier"].startswith("plain")
    assert "; lacks Store.barrier" in found["store"]
    assert ("quick" in look()["barrier"]) == hasattr(torch.distributed.Store, "barrier")


def test_what_is_told_of_the_package_is_true():
    first, last = (".".join(map(str, version)) for version in TESTED)
    assert f"torch {first} and {last}" in torch_versions.__doc__
    sources = {path: path.read_text() for path in (ROOT / "refdist").rglob("*.py")}
    del sources[ROOT / "refdist" / "__main__.py"]
    read = set(re.findall(r'"(REFDIST_\w+)"', "".join(sources.values())))
    assert read - {"REFDIST_BARRIER"} == set(VARIABLES)  # that one is a name of exploration


def test_the_three_lines_to_begin_with(capsys, monkeypatch):
    _, out, _ = run_command("python -m refdist", capsys)
    code = re.search(r"as hello\.py:\n\n(.*?)\n\nand start", out, re.DOTALL)[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    with socket.socket() as held:  # it keeps the port, and lets rank 0 listen there
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("REFDIST_PORT", str(held.getsockname()[1]))
        exec(compile(code, "hello.py", "exec"), {})
    assert capsys.readouterr().out == "0 ['hello from 0']\n"


# Command lines: their help has examples that work, and a wrong argument is one line.

BENCHMARKS = ["control", "allreduce", "cpu_allreduce", "secret", "weights", "nccl"]
COMMANDS = [
    *(f"python -m refdist{name}" for name in ("", ".pipeline", ".lab.learn", ".benchmarks")),
    *(f"python -m refdist.benchmarks {name}" for name in BENCHMARKS),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_examples(command, capsys, tmp_path, monkeypatch):
    status, out, err = run_command(f"{command} --help", capsys)
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 200
    usage, description, *_, examples = out.split("\n\n")
    assert usage.startswith(f"usage: {command} ") and description.endswith(".")
    assert examples.startswith("examples:\n") and examples.count("\n") >= 1
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    monkeypatch.chdir(tmp_path)
    for example in examples.split("\n  ")[1:]:
        if "benchmarks" in example and "--help" not in example and "cpu_allreduce" not in example:
            benchmarks = importlib.import_module("refdist.benchmarks.__main__")
            benchmarks.make_parser().parse_args(shlex.split(example)[3:])
            continue
        status, out, err = run_command(example, capsys)
        assert (status, err) == (0, "") and out


PIPELINE = "refdist.pipeline --model phi-4 --device l4 --stages 4"
WRONG = {
    "refdist --bogus": "unrecognized arguments: --bogus",
    "refdist everything": "unrecognized arguments: everything",
    "refdist.pipeline": "the following arguments are required: --model, --device, --stages",
    f"{PIPELINE} --model gpt-9": "model='gpt-9': must be one of",
    f"{PIPELINE} --device h300": "device='h300': must be one of",
    f"{PIPELINE} --stages 0": "--stages: 0: must be at least 1",
    f"{PIPELINE} --stages 41": "--stages: 41: must be at most 40, the layers of phi-4",
    f"{PIPELINE} --stages two": "--stages: invalid int value: 'two'",
    f"{PIPELINE} --prompt-tokens 1{'0' * 400}": "at least 1 and at most 1,000,000,000",
    f"{PIPELINE} --memory-share 2": "--memory-share: 2: must be above 0 and at most 1",
    f"{PIPELINE} --reserved-gib 1e308": "--reserved-gib: 1e308: must be finite, at least 0",
    f"{PIPELINE} --weights int8": "--weights: invalid choice: 'int8'",
    "refdist.lab.learn": "the following arguments are required: notebooks, folder",
    "refdist.lab.learn nowhere learn": "nowhere: must be a folder with notebooks",
    "refdist.lab.learn . learn": "broken.ipynb: no copy can be made: JSONDecodeError",
    "refdist.lab.learn good good/a.ipynb": "good/a.ipynb: File exists",
    "refdist.benchmarks": "the following arguments are required: NAME",
    "refdist.benchmarks all": "invalid choice: 'all'",
    "refdist.benchmarks control --world-sizes 1": "--world-sizes: 1: must be at least 2",
    "refdist.benchmarks control --many-ranks 3": "--many-ranks: 3: must be at least 4",
    "refdist.benchmarks control --repeats 0": "--repeats: 0: must be at least 1",
    "refdist.benchmarks control --output no/x": "--output: no/x: No such file or directory",
    "refdist.benchmarks control --output good": "--output: good: Is a directory",
    "refdist.benchmarks allreduce --world-size 0": "--world-size: 0: must be at least 1",
    "refdist.benchmarks allreduce --sizes 12": "--sizes: 12: must be a multiple of 8, above 0",
    "refdist.benchmarks allreduce --sizes": "--sizes: expected at least one argument",
    "refdist.benchmarks allreduce --dtypes float8": "--dtypes: invalid choice: 'float8'",
    "refdist.benchmarks allreduce --ways three-shot": "--ways: invalid choice: 'three-shot'",
    "refdist.benchmarks allreduce --backend nccl --world-size 999": (
        "--backend: nccl: must have a GPU for each of 999 ranks, and torch finds "
    ),
    "refdist.benchmarks cpu_allreduce --world-sizes 0": "--world-sizes: 0: must be at least 1",
    "refdist.benchmarks cpu_allreduce --sizes 0": "--sizes: 0: must be a multiple of 4, above 0",
    "refdist.benchmarks secret --world-sizes 2 1": "--world-sizes: 1: must be at least 2",
    "refdist.benchmarks weights --world-size 1": "--world-size: 1: must be at least 2",
    "refdist.benchmarks weights --layers -1": "--layers: -1: must be at least 0",
    "refdist.benchmarks weights --vocabulary 0": "--vocabulary: 0: must be at least 1",
    "refdist.benchmarks weights --buffer-mib 0": "--buffer-mib: 0: must be at least 1",
    "refdist.benchmarks nccl --world-size 1": "--world-size: 1: must be at least 2",
    "refdist.benchmarks nccl --world-size 99": (
        "must have a GPU for each of 99 ranks, and torch finds "
    ),
    "refdist.benchmarks allreduce --sizes 8000000000000": "and at most ",
    "refdist.benchmarks nccl --sizes 6": "--sizes: 6: must be a multiple of 4, above 0",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_argument_is_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.ipynb").write_text("{")
    Path("good").mkdir()
    Path("good/a.ipynb").write_text('{"cells": []}')
    status, out, err = run_command(f"python -m {arguments}", capsys)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"python -m {arguments.split()[0]}") and ": error: " in err
    assert WRONG[arguments] in err


# What ends a command from outside leaves no traceback: Ctrl-C, and a reader such as head.


def test_ctrl_c():
    with pytest.raises(SystemExit) as ended:
        run(lambda: signal.raise_signal(signal.SIGINT))
    assert ended.value.code == 130


def test_a_reader_that_has_ended():
    process = subprocess.Popen(
        [sys.executable, "-m", "refdist"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 141
