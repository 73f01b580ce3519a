"""The names of vLLM's own module beside those of refdist: signatures, and what functions return.

A rank of its own imports each version of vLLM, where that is fetched. Nothing forms a group.
"""

import contextlib
import dataclasses
import inspect
import itertools
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ranks import LOCAL, run_ranks
from torch.distributed import DistNetworkError
from vllm_module import FILES, NEWEST, each_version, import_vllm, needs_vllm

import refdist
from refdist import (
    create_tcp_store,
    get_cached_tcp_store_client,
    verify_group_size_divides_partition,
)

EVERY = tuple(FILES)
PARTITION = "VLLM_PP_LAYER_PARTITION"


@dataclass(frozen=True)
class Allowed:
    """Differences that are meant, one a line, and the versions of vLLM from which refdist differs.

    A difference that no line allows fails a test, and so does a line that no difference needs.
    """

    why: str
    versions: tuple[str, ...]
    lines: str


def check(found: dict[str, Any], allowed: list[Allowed], version: str) -> None:
    lines = {
        line.strip()
        for entry in allowed
        if version in entry.versions
        for line in entry.lines.strip().splitlines()
    }
    found_alone = {line: found[line] for line in found.keys() - lines}
    assert (found_alone, sorted(lines - found.keys())) == ({}, [])


# Names and signatures.

DECLINED = "it reads vLLM's configuration, which refdist has not"
OWN = "of refdist alone"
OLD = "vLLM had it not yet"
SIGNATURES = [
    Allowed(DECLINED, EVERY[1:], "get_worker_rank_suffix: only vLLM"),
    Allowed(
        DECLINED,
        EVERY[2:],
        """
        get_cpu_distributed_timeout_or_none: only vLLM
        get_distributed_timeout_or_none: only vLLM
        """,
    ),
    Allowed(
        "the specification has it; vLLM dropped it between 0.9 and 0.19; by name, both agree",
        EVERY[1:],
        "StatelessProcessGroup(socket): only refdist, before data_expiration_seconds",
    ),
    Allowed(
        "it may be left out, as newer versions do",
        EVERY[:1],
        "StatelessProcessGroup(socket): required in vLLM, None in refdist",
    ),
    Allowed(
        "the specification has backend; it may be left out, so all that follow have defaults",
        EVERY[1:],
        """
        init_gloo_process_group(backend): only refdist, before prefix_store
        init_gloo_process_group(prefix_store): required in vLLM, None in refdist
        init_gloo_process_group(group_rank): required in vLLM, None in refdist
        init_gloo_process_group(group_size): required in vLLM, None in refdist
        init_gloo_process_group(timeout): required in vLLM, None in refdist
        """,
    ),
    Allowed(
        OLD,
        EVERY[:1],
        """
        StatelessProcessGroup.all_reduce: only refdist
        StatelessProcessGroup.broadcast: only refdist
        StatelessProcessGroup.recv: only refdist
        StatelessProcessGroup.send: only refdist
        StatelessProcessGroup.create(listen_socket): only refdist
        create_tcp_store: only refdist
        get_cached_tcp_store_client: only refdist
        init_gloo_process_group: only refdist
        stateless_init_torch_distributed_process_group(group_name): only refdist
        stateless_init_torch_distributed_process_group(listen_socket): only refdist
        stateless_init_torch_distributed_process_group(return_store): only refdist
        """,
    ),
    Allowed(
        OLD,
        EVERY[:2],
        """
        is_weak_contiguous: only refdist
        verify_group_size_divides_partition: only refdist
        """,
    ),
    Allowed(
        OLD,
        EVERY[:3],
        """
        cpu_all_reduce_: only refdist
        stateless_init_torch_distributed_process_group(timeout): only refdist
        """,
    ),
    Allowed(
        "what refdist raises and records has names, so that a caller can tell it apart",
        EVERY,
        """
        AuthenticationError: only refdist
        BarrierError: only refdist
        CollectiveError: only refdist
        ConcurrentCallError: only refdist
        GroupCreationError: only refdist
        InsecureGroupWarning: only refdist
        MessageError: only refdist
        MessageExpiredError: only refdist
        MessageTimeoutError: only refdist
        StoreConnectionError: only refdist
        PhaseEvent: only refdist
        PhaseEvent.seconds: only refdist
        StatelessProcessGroup(events): only refdist
        StatelessProcessGroup.events: only refdist
        """,
    ),
    Allowed(
        "every wait can be given a limit; after all parameters of vLLM",
        EVERY,
        """
        StatelessProcessGroup.all_gather_obj(timeout): only refdist
        StatelessProcessGroup.broadcast_obj(timeout): only refdist
        StatelessProcessGroup.recv_obj(timeout): only refdist
        """,
    ),
    Allowed(
        "options by keyword alone, whose defaults leave a call for vLLM as it is",
        EVERY,
        """
        StatelessProcessGroup(joined): only refdist
        StatelessProcessGroup(messages): only refdist
        StatelessProcessGroup.create(messages): only refdist
        StatelessProcessGroup.create(secret): only refdist
        StatelessProcessGroup.create(wire): only refdist
        stateless_init_torch_distributed_process_group(wire): only refdist
        """,
    ),
    Allowed(
        OWN,
        EVERY,
        """
        StatelessProcessGroup.close: only refdist
        StatelessProcessGroup.end: only refdist
        StatelessProcessGroup.from_env: only refdist
        StatelessProcessGroup.admit: only refdist
        StatelessProcessGroup.generation: only refdist
        StatelessProcessGroup.host: only refdist
        StatelessProcessGroup.joined: only refdist
        StatelessProcessGroup.messages: only refdist
        StatelessProcessGroup.port: only refdist
        StatelessProcessGroup.realign: only refdist
        StatelessProcessGroup.successor: only refdist
        StatelessProcessGroup.split: only refdist
        StatelessProcessGroup.shrink: only refdist
        StatelessProcessGroup.join: only refdist
        StatelessProcessGroup.socket: only refdist
        """,
    ),
]


Signature = dict[str, dict[str, str]]


def signature_of(value: Any) -> Signature:
    """Kind and default of each parameter, in order."""
    return {
        parameter.name: {
            "kind": parameter.kind.description,
            "default": "required"
            if parameter.default is inspect.Parameter.empty
            else repr(parameter.default),
        }
        for parameter in inspect.signature(value).parameters.values()
    }


def described(module: Any, names: list[str]) -> dict[str, Signature | None]:
    """The signature of each name, and of what a dataclass has; None for what cannot be called."""
    found: dict[str, Signature | None] = {}
    for name in names:
        value = getattr(module, name)
        is_error = inspect.isclass(value) and issubclass(value, BaseException)
        found[name] = signature_of(value) if callable(value) and not is_error else None
        for member, inner in inspect.getmembers(value) if dataclasses.is_dataclass(value) else ():
            if not member.startswith("_"):
                is_method = inspect.isroutine(inner)
                found[f"{name}.{member}"] = signature_of(inner) if is_method else None
    return found


def vllm_names(_here: Any, version: str) -> dict[str, Signature | None]:
    module = import_vllm(version)
    names = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (name.isupper() or getattr(value, "__module__", "") == module.__name__)
    ]
    assert "StatelessProcessGroup" in names and "USE_SCHED_YIELD" in names
    return described(module, names)


def signature_differences(
    theirs: dict[str, Signature | None], ours: dict[str, Signature | None]
) -> Iterator[str]:
    """What a caller who wrote for vLLM's module, or for ours, may notice; a line for each."""
    yield from (f"{name}: only vLLM" for name in theirs if name not in ours)
    yield from (f"{name}: only refdist" for name in ours if name not in theirs)
    for name in theirs.keys() & ours.keys():
        their, our = theirs[name], ours[name]
        if their is not None and our is not None:
            yield from parameter_differences(name, their, our)
        elif their is not our:
            yield f"{name}: can be called in one of them"


def parameter_differences(name: str, theirs: Signature, ours: Signature) -> Iterator[str]:
    shared = [parameter for parameter in theirs if parameter in ours]
    if shared != [parameter for parameter in ours if parameter in theirs]:
        yield f"{name}: another order"
    yield from (f"{name}({parameter}): only vLLM" for parameter in theirs if parameter not in ours)
    for parameter in shared:
        for what, their in theirs[parameter].items():
            if (our := ours[parameter][what]) != their:
                yield f"{name}({parameter}): {their} in vLLM, {our} in refdist"
    for place, (parameter, own) in enumerate(ours.items()):
        if parameter not in theirs:
            # a positional one moves those behind it; any other must have a default
            behind = [other for other in list(ours)[place:] if other in theirs]
            moves = f", before {behind[0]}" if behind and "positional" in own["kind"] else ""
            required = ", required" if own["default"] == "required" else ""
            yield f"{name}({parameter}): only refdist{moves}{required}"


@pytest.mark.parametrize("version", each_version())
def test_names_and_signatures(version):
    [theirs] = run_ranks(vllm_names, 1, version)
    ours = described(refdist, refdist.__all__)
    check(dict.fromkeys(signature_differences(theirs, ours)), SIGNATURES, version)


@pytest.mark.parametrize(
    ("ours", "line"),
    [
        (lambda a, b=1: 0, None),
        (lambda b, a=1: 0, "f: another order"),
        (lambda a: 0, "f(b): only vLLM"),
        (lambda a, b=2: 0, "f(b): 1 in vLLM, 2 in refdist"),
        (lambda a, *, b=1: 0, "f(b): positional or keyword in vLLM, keyword-only in refdist"),
        (lambda a, b=1, c=0: 0, "f(c): only refdist"),
        (lambda a, c=0, b=1: 0, "f(c): only refdist, before b"),
        (lambda a, b=1, *, c: 0, "f(c): only refdist, required"),
    ],
)
def test_a_difference_is_found(ours, line):
    theirs = signature_of(lambda a, b=1: 0)
    found = list(parameter_differences("f", theirs, signature_of(ours)))
    assert line in found if line else found == []


def test_the_table_and_the_differences_must_agree():
    table = [Allowed("a reason", EVERY, "a difference")]
    check({"a difference": None}, table, NEWEST)
    for found in ({}, {"a difference": None, "another": None}):
        with pytest.raises(AssertionError):
            check(found, table, NEWEST)


# Results. Every function is called with every value of a range, also with wrong ones. A difference
# names what is wrong with the arguments; one that does not is never allowed.

RESULTS = [
    Allowed(
        "a zero is refused by name",
        EVERY,
        """
        divide by 0: ZeroDivisionError in vLLM, ValueError in refdist
        ensure_divisibility by 0: ZeroDivisionError in vLLM, ValueError in refdist
        """,
    ),
    Allowed(
        "a zero is refused by name",
        EVERY[2:],
        """
        verify_group_size_divides_partition by 0: ZeroDivisionError in vLLM, ValueError in refdist
        """,
    ),
    Allowed(
        "no stage has such layers",
        EVERY,
        """
        get_pp_indices of no stage: ZeroDivisionError in vLLM, ValueError in refdist
        get_pp_indices of no stage: IndexError in vLLM, ValueError in refdist
        get_pp_indices of no stage: a result in vLLM, ValueError in refdist
        get_pp_indices of -1 layers: a result in vLLM, ValueError in refdist
        get_pp_indices by a negative override: a result in vLLM, ValueError in refdist
        """,
    ),
    Allowed(
        "parts that cannot be are refused by name",
        EVERY,
        """
        split_tensor_along_last_dim of no dimension: IndexError in vLLM, ValueError in refdist
        split_tensor_along_last_dim into 0: ZeroDivisionError in vLLM, ValueError in refdist
        split_tensor_along_last_dim into -1: RuntimeError in vLLM, ValueError in refdist
        split_tensor_along_last_dim into -1: a result in vLLM, ValueError in refdist
        """,
    ),
    Allowed(
        "as many parts as were asked for; vLLM returns one",
        EVERY,
        "split_tensor_along_last_dim of size 0: another result",
    ),
]
NUMBERS = range(-12, 13)


def outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "a result", function(*arguments)
    except Exception as error:
        return type(error).__name__, None


def result_differences(
    module: Any,
    name: str,
    calls: Iterator[tuple[Any, ...]],
    wrong: Callable[..., str],
    shown: Callable[[Any], Any] = lambda result: result,
) -> dict[str, tuple[Any, ...]]:
    """A line for each kind of difference, and the first call that has it."""
    found: dict[str, tuple[Any, ...]] = {}
    for arguments in calls:
        their, their_result = outcome(getattr(module, name), arguments)
        our, our_result = outcome(getattr(refdist, name), arguments)
        if their != our:
            line = f"{name}{wrong(*arguments)}: {their} in vLLM, {our} in refdist"
            found.setdefault(line, arguments)
        elif their == "a result" and shown(their_result) != shown(our_result):
            found.setdefault(f"{name}{wrong(*arguments)}: another result", arguments)
    return found


def pairs() -> Iterator[tuple[Any, ...]]:
    return itertools.product(NUMBERS, NUMBERS)


def wrong_pair(_numerator: int, denominator: int) -> str:
    return " by 0" if denominator == 0 else ""


def stages(sizes: range, layers: range) -> Iterator[tuple[Any, ...]]:
    """Layers, stage and number of stages."""
    for size in sizes:
        yield from itertools.product(layers, range(-1, size + 1), [size])


def wrong_stage(layers: int, stage: int, size: int) -> str:
    if not 0 <= stage < size:
        return " of no stage"
    if layers < 0:
        return f" of {layers} layers"
    return " by a negative override" if "-" in os.environ.get(PARTITION, "") else ""


def partition_differences(module: Any) -> dict[str, tuple[Any, ...]]:
    """``get_pp_indices`` without an override, and with each text of up to five characters."""
    os.environ.pop(PARTITION, None)
    calls = stages(range(10), range(-1, 42))
    found = result_differences(module, "get_pp_indices", calls, wrong_stage)
    for length in range(6):
        for characters in itertools.product("13-, .", repeat=length):
            os.environ[PARTITION] = "".join(characters)
            calls = stages(range(1, 4), range(2, 5))
            found |= result_differences(module, "get_pp_indices", calls, wrong_stage)
    return found


def parts_to_be_cut() -> Iterator[tuple[Any, ...]]:
    for shape in [(), *((n,) for n in range(13)), *((2, 3, n) for n in range(13))]:
        tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
        for number, contiguous in itertools.product(range(-1, 14), (False, True)):
            yield tensor, number, contiguous
            yield tensor.transpose(0, -1) if shape else tensor, number, contiguous


def wrong_parts(tensor: torch.Tensor, number: int, _contiguous: bool) -> str:
    if tensor.dim() == 0:
        return " of no dimension"
    if number < 1:
        return f" into {number}"
    return " of size 0" if tensor.size(-1) == 0 else ""


def layout(parts: tuple[torch.Tensor, ...]) -> Any:
    """What can be told of parts: type, values, strides, and their place in memory."""
    return type(parts), [
        (part.tolist(), part.shape, part.stride(), part.storage_offset()) for part in parts
    ]


def views() -> Iterator[tuple[Any, ...]]:
    """Every view of up to three dimensions into a few elements, which may overlap or have gaps."""
    for dtype, dimensions in itertools.product((torch.float16, torch.int64), range(4)):
        memory = torch.zeros(6, dtype=dtype)
        shapes = itertools.product(range(4), repeat=dimensions)
        for shape, strides, offset in itertools.product(
            shapes, itertools.product((0, 1, 2, 3), repeat=dimensions), (0, 1, 3)
        ):
            last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
            if last < 6:
                yield (memory.as_strided(shape, strides, offset),)


def all_result_differences(_here: Any, version: str) -> dict[str, tuple[Any, ...]]:
    module = import_vllm(version)
    warnings.simplefilter("ignore")  # vLLM uses what torch is to drop
    found = partition_differences(module)
    for name in ("divide", "ensure_divisibility", "verify_group_size_divides_partition"):
        if hasattr(module, name):
            found |= result_differences(module, name, pairs(), wrong_pair)
    found |= result_differences(
        module, "split_tensor_along_last_dim", parts_to_be_cut(), wrong_parts, layout
    )
    if hasattr(module, "is_weak_contiguous"):
        found |= result_differences(module, "is_weak_contiguous", views(), lambda _: "")
    return found


@pytest.mark.parametrize("version", each_version())
def test_results(version):
    [found] = run_ranks(all_result_differences, 1, version)
    check(found, RESULTS, version)


# A quantisation group that would lie on two ranks is refused; the error names both numbers, the
# layer, and the rule, as vLLM's does.

REFUSED = (96, 64, "model.layers.0.mlp", " or a divisor of 24")


def vllm_error(_here: Any, version: str) -> str:
    with pytest.raises(ValueError, match="divisible") as raised:
        import_vllm(version).verify_group_size_divides_partition(*REFUSED)
    return str(raised.value)


@needs_vllm(NEWEST)
def test_an_error_of_a_group_size_says_what_that_of_vllm_says():
    [theirs] = run_ranks(vllm_error, 1, NEWEST)
    with pytest.raises(ValueError, match="must be a multiple of group_size=64") as raised:
        verify_group_size_divides_partition(*REFUSED)
    for part in (*map(str, REFUSED), "input_size_per_partition=96", "tensor_parallel_size"):
        assert part in str(raised.value) and part in theirs


def test_group_sizes_that_divide():
    for size, group in [(96, 32), (96, 96), (96, -1), (0, 32)]:
        verify_group_size_divides_partition(size, group)
    with pytest.raises(ValueError, match="group_size=0: a quantisation group must have"):
        verify_group_size_divides_partition(96, 0)
    with pytest.raises(ValueError, match=r"^input_size_per_partition=96: must be a multiple of "):
        verify_group_size_divides_partition(96, 64)


# The cached client: one for each store in a process, until the store ends, and not across a fork.


def cached_clients(here):
    stores = [create_tcp_store(LOCAL, 0, is_master=True) for _ in range(2)]
    first, second = (get_cached_tcp_store_client(LOCAL, store.port) for store in stores)
    assert first is not second and first is not stores[0]
    assert get_cached_tcp_store_client(host=LOCAL, port=stores[0].port) is first
    assert get_cached_tcp_store_client(LOCAL, stores[1].port) is second
    first.set("key", "value")
    assert stores[0].get("key") == b"value"
    # threads that come at the same time get the same one
    third, clients, begin = create_tcp_store(LOCAL, 0, is_master=True), [], threading.Barrier(8)

    def ask() -> None:
        begin.wait(20)
        clients.append(get_cached_tcp_store_client(LOCAL, third.port))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(clients) == 8 and len({id(client) for client in clients}) == 1


def test_a_process_has_one_cached_client_of_a_store():
    run_ranks(cached_clients, 1)


def client_of_a_store_that_ends(here):
    if here.rank == 1:
        store = create_tcp_store(LOCAL, 0, is_master=True)
        here.tell("port", store.port)
        here.ask("connected")
        os.kill(os.getpid(), signal.SIGKILL)
    port = here.ask("port")
    client = get_cached_tcp_store_client(LOCAL, port)
    here.tell("connected")
    with pytest.raises(DistNetworkError):
        client.get("a key that nobody sets")
    new_store = create_tcp_store(LOCAL, port, is_master=True)
    new_client = get_cached_tcp_store_client(LOCAL, port)
    assert new_client is not client
    assert new_client is get_cached_tcp_store_client(LOCAL, port)
    new_client.set("key", "value")
    assert new_store.get("key") == b"value"


def test_a_store_that_ended_and_came_again_gets_a_new_client():
    run_ranks(client_of_a_store_that_ends, 2, killed=[1])


def client_of_a_child(here):
    store = create_tcp_store(LOCAL, 0, is_master=True)
    client = get_cached_tcp_store_client(LOCAL, store.port)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            own = get_cached_tcp_store_client(LOCAL, store.port)
            own.set("the child has another one", str(own is not client))
        os._exit(0)
    assert client.get("the child has another one") == b"True"
    os.waitpid(child, 0)
    assert get_cached_tcp_store_client(LOCAL, store.port) is client
    client.set("key", "value")
    assert store.get("key") == b"value"


def test_a_forked_child_has_a_client_of_its_own():
    run_ranks(client_of_a_child, 1)


def test_a_cached_client_needs_an_address():
    with pytest.raises(ValueError, match="port=0: only rank 0 can take any free port"):
        get_cached_tcp_store_client(LOCAL, 0)
    with pytest.raises(ValueError, match="host='': must name one address"):
        get_cached_tcp_store_client("", 29500)
