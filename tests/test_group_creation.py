"""How groups form, fail to form, and end."""

import dataclasses
import os
import re
import socket
import threading
import time
from collections import deque
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import LOCAL, Watched, run_ranks, run_threads
from torch.distributed import HashStore, PrefixStore

from refdist import (
    BarrierError,
    GroupCreationError,
    StatelessProcessGroup,
    StoreConnectionError,
    create_tcp_store,
    torch_versions,
)
from refdist.joining import rendezvous

SLACK = 6.0  # seconds that a slow machine may take beyond a protocol's own deadline


def create(port=0, rank=0, world_size=1, host=LOCAL, **options):
    return StatelessProcessGroup.create(host, port, rank, world_size, **options)


@pytest.fixture
def closed_port():
    """A port on which nobody listens, and that nobody can take."""
    with socket.socket() as bound:
        bound.bind((LOCAL, 0))
        yield bound.getsockname()[1]


@pytest.fixture
def mute_port():
    """A port on which something listens that never answers."""
    with socket.socket() as listener:
        listener.bind((LOCAL, 0))
        listener.listen()
        yield listener.getsockname()[1]


# Everyone: a group of the given rank and size; torch.distributed knows of none, before or after.


def _form_group(here):
    before = dist.is_initialized()
    with here.group() as group:
        gathered = group.all_gather_obj(("I am", here.rank))
        during = dist.is_initialized()
        shape = group.rank, group.world_size
    return shape, gathered, (before, during, dist.is_initialized())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_group_without_global_state(world_size):
    for rank, (shape, gathered, initialized) in enumerate(run_ranks(_form_group, world_size)):
        assert shape == (rank, world_size)
        assert gathered == [("I am", r) for r in range(world_size)]
        assert initialized == (False, False, False)


# Processes 3 and 1 form one group, and 2, 3, 0 and 1 another. Each is a different rank in each, and
# what is said in one group is not heard in the other, whichever was formed first.

SMALL, LARGE = [3, 1], [2, 3, 0, 1]


def _overlap(here, small_first):
    groups = {}
    for name in ("small", "large") if small_first else ("large", "small"):
        members = SMALL if name == "small" else LARGE
        if here.rank in members:
            groups[name] = here.group(name, members)
    heard = {}
    for _ in range(3):
        for name, group in groups.items():
            group.barrier()
            heard[name] = group.all_gather_obj((name, here.rank))
    shapes = {name: (group.rank, group.world_size) for name, group in groups.items()}
    for group in groups.values():
        group.close()
    assert not dist.is_initialized()
    return shapes, heard


@pytest.mark.parametrize("small_first", [True, False])
def test_one_process_in_overlapping_groups(small_first):
    for process, (shapes, heard) in enumerate(run_ranks(_overlap, 4, small_first)):
        assert shapes["large"] == (LARGE.index(process), 4)
        assert heard["large"] == [("large", p) for p in LARGE]
        if process in SMALL:
            assert shapes["small"] == (SMALL.index(process), 2)
            assert heard["small"] == [("small", p) for p in SMALL]
        else:
            assert "small" not in shapes


# Where the store listens.


def _connects(address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.settimeout(SLACK)
        return probe.connect_ex((address, port)) == 0


@pytest.mark.parametrize(
    ("host", "address", "others"),
    [
        ("127.0.0.1", "127.0.0.1", ["127.0.0.2", "::1"]),
        ("127.0.0.2", "127.0.0.2", ["127.0.0.1", "::1"]),
        ("::1", "::1", ["127.0.0.1"]),
        ("[::1]", "::1", ["127.0.0.1"]),
    ],
)
def test_listens_on_its_host_only(host, address, others):
    reached = []
    # a stranger may have the same port on another address, but not every time
    for _ in range(5):
        with create(host=host) as group:
            assert group.host == address
            assert group.socket.getsockname()[:2] == (address, group.port)
            assert _connects(address, group.port)
            reached.append([other for other in others if _connects(other, group.port)])
    assert [] in reached


def test_listens_on_an_address_of_localhost():
    with create(host="localhost") as group:
        known = {entry[4][0] for entry in socket.getaddrinfo("localhost", 0)}
        assert group.host in known
        assert _connects(group.host, group.port)


def _form_group_on(here, host, address):
    with here.place("group", host=address) as (port, listener):
        group = StatelessProcessGroup.create(
            host, port, here.rank, here.world_size, listen_socket=listener
        )
    with group:
        return group.all_gather_obj((here.rank, group.host, group.port == port))


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("::1", "::1"), ("[::1]", "::1")],
)
def test_ranks_meet_by_name_and_by_each_kind_of_address(host, address):
    for gathered in run_ranks(_form_group_on, 2, host, address):
        assert [rank for rank, _, _ in gathered] == [0, 1]
        assert all(its_host in (host, address) for _, its_host, _ in gathered)
        assert all(same_port for _, _, same_port in gathered)


def test_port_0_takes_a_free_port_that_the_group_tells():
    with create(port=0) as one, create(port=0) as other:
        assert one.port != other.port
        assert one.port > 0 and one.socket.getsockname()[1] == one.port


def _meet_on_a_port_that_was_told(here):
    if here.rank == 0:
        with create(port=0) as first:
            port = first.port
        here.tell("port", port)
    group = create(here.ask("port"), here.rank, here.world_size)
    assert group.port == here.ask("port")
    group.close()


# Rank 0 takes port 0 for a group of its own, closes it, and forms the next on the port that it got.
def test_a_port_that_was_told_can_be_used():
    run_ranks(_meet_on_a_port_that_was_told, 3)


def test_listen_socket_stays_the_callers():
    with socket.socket() as listener:
        listener.bind((LOCAL, 0))
        port = listener.getsockname()[1]
        for _ in range(3):
            with create(port, listen_socket=listener) as group:
                assert group.port == port
                assert group.socket is listener
                assert _connects(LOCAL, port)
            assert listener.getsockname()[1] == port  # a closed socket would raise


def test_own_socket_is_closed_with_the_group():
    group = create()
    own_socket = group.socket
    group.close()
    assert own_socket.fileno() == -1


# Those who came: GroupCreationError within the timeout, saying how many came and who is missing.


def _come_without_the_last(here, world_size, timeout):
    here.meet("start")
    start = time.monotonic()
    with here.place("group") as (port, listener), pytest.raises(GroupCreationError) as caught:
        create(port, here.rank, world_size, store_timeout=timeout, listen_socket=listener)
    return str(caught.value), caught.value.missing, port, time.monotonic() - start


@pytest.mark.parametrize(("came", "world_size"), [(1, 2), (2, 4), (3, 4)])
def test_missing_ranks_end_the_creation(came, world_size):
    results = run_ranks(_come_without_the_last, came, world_size, 2)
    absent = tuple(range(came, world_size))
    names = "rank 1" if world_size == 2 else "ranks 2 and 3" if came == 2 else "rank 3"
    for text, missing, port, seconds in results:
        assert f"{came} of {world_size} ranks came to {LOCAL}:{port} within 2 s" in text
        assert f"missing: {names}" in text
        assert missing == absent
        assert seconds < 2 + SLACK


# Rank 1: StoreConnectionError within the timeout, naming the address.
def test_missing_rank_0_ends_the_creation(closed_port):
    start = time.monotonic()
    message = f"no store answered on {LOCAL}:{closed_port} within 1 s .*is rank 0 running"
    with pytest.raises(StoreConnectionError, match=message):
        create(closed_port, 1, 2, store_timeout=1)
    assert time.monotonic() - start < 1 + SLACK


def _come_to(here, port):
    start = time.monotonic()
    with pytest.raises(StoreConnectionError, match="did not answer as a torch store does"):
        create(port, 1, 2, store_timeout=2)
    return time.monotonic() - start


# Rank 1 connects to something that never answers: the same error, and its process can end.
def test_a_mute_listener_ends_the_creation(mute_port):
    assert run_ranks(_come_to, 1, mute_port)[0] < 2 + SLACK


# Rank 2 does not come. Then everyone tries again on the same port, while the errors of the first
# attempt are kept, as a notebook keeps the last one.


def _try_again(here, own_socket):
    with here.place("group") as (port, listener):
        if own_socket and here.rank == 0:
            listener.close()
            listener = None
        if here.rank < 2:
            with pytest.raises(GroupCreationError, match=r"2 of 3 ranks .*missing: rank 2") as kept:
                create(port, here.rank, 3, store_timeout=2, listen_socket=listener)
            assert kept.value.missing == (2,)
        here.meet("second attempt")
        with create(port, here.rank, 3, listen_socket=listener) as group:
            return group.all_gather_obj(here.rank)


@pytest.mark.parametrize("own_socket", [True, False])
def test_creation_works_after_it_failed(own_socket):
    assert run_ranks(_try_again, 3, own_socket) == [[0, 1, 2]] * 3


# Input that breaks a rule: an error that names the value and the rule.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank=2: must be in 0..1 (world_size=2)"),
        ({"rank": -1, "world_size": 2}, "rank=-1: must be in 0..1 (world_size=2)"),
        ({"rank": 0, "world_size": 0}, "world_size=0: must be at least 1"),
        ({"rank": 0, "world_size": -3}, "world_size=-3: must be at least 1"),
        ({"port": -1}, "port=-1: must be in 0..65535"),
        ({"port": 65536}, "port=65536: must be in 0..65535"),
        ({"port": 65536, "rank": 1, "world_size": 2}, "port=65536: must be in 0..65535"),
        ({"port": 0, "rank": 1, "world_size": 2}, "port=0: only rank 0 can take any free port"),
        ({"host": ""}, "host='': must name one address"),
        ({"host": "", "port": 1, "rank": 1, "world_size": 2}, "host='': must name one address"),
        ({"store_timeout": 0}, "store_timeout=0: must be above 0 seconds"),
        ({"store_timeout": -1}, "store_timeout=-1: must be above 0 seconds"),
        ({"data_expiration_seconds": 0}, "data_expiration_seconds=0: must be above 0"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        create(**options)


def test_taken_port():
    with socket.socket() as holder:
        holder.bind((LOCAL, 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on host='{LOCAL}', port={port}: ") as e:
            create(port)
        assert e.value.errno is not None and "in use" in str(e.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_host_that_does_not_resolve(rank):
    with pytest.raises(OSError, match=r"host='nowhere\.invalid' does not resolve"):
        create(29500, rank, 2, host="nowhere.invalid", store_timeout=5)


def test_host_of_another_machine():
    # a documentation address (RFC 5737), which no machine has
    with pytest.raises(OSError, match=r"cannot listen on host='192\.0\.2\.1', port=0"):
        create(host="192.0.2.1")


# Processes 1 and 2 both come as rank 1 of 3. The second of them is told who has the rank; the
# other ranks miss rank 2.


def _come_as(here, ranks, alike=False):
    if alike:
        os.getpid = lambda: 7
        socket.gethostname = lambda: "worker"
    here.meet("start")
    with here.place("group") as (port, listener):
        try:
            create(port, ranks[here.rank], 3, store_timeout=2, listen_socket=listener)
        except (ValueError, GroupCreationError) as error:
            return type(error).__name__, str(error), os.getpid()


def test_a_rank_that_is_taken():
    rank_0, *rivals = run_ranks(_come_as, 3, [0, 1, 1])
    assert rank_0[0] == "GroupCreationError" and "missing: rank 2" in rank_0[1]
    (_, in_time, holder), (_, refused, _) = sorted(rivals)
    assert {kind for kind, _, _ in rivals} == {"GroupCreationError", "ValueError"}
    assert "missing: rank 2" in in_time
    assert re.match(rf"rank=1: is taken on {LOCAL}:\d+ by process {holder} of ", refused)
    assert "each rank of a group is one process" in refused


# Containers may have the same name, and processes in them the same number. They are not the same.
def test_a_rank_that_is_taken_by_a_process_of_the_same_name_and_number():
    _, *rivals = run_ranks(_come_as, 3, [0, 1, 1], True)
    (_, in_time, _), (kind, refused, _) = sorted(rivals)
    assert "missing: rank 2" in in_time
    assert kind == "ValueError" and "by process 7 of worker; each rank of a group is" in refused


# Rank 1 thinks that the group has 3 ranks, rank 0 that it has 2.


def _come_with_size(here, sizes):
    with here.place("group") as (port, listener):
        size = sizes[here.rank]
        here.meet("start")
        try:
            create(port, here.rank, size, store_timeout=2, listen_socket=listener)
        except (ValueError, GroupCreationError) as error:
            return type(error).__name__, str(error)


def test_different_world_sizes():
    (kind_0, text_0), (kind_1, text_1) = run_ranks(_come_with_size, 2, [2, 3])
    assert kind_1 == "ValueError"
    assert re.match(rf"world_size=3: rank 0 formed the group on {LOCAL}:\d+ with 2", text_1)
    assert kind_0 == "GroupCreationError" and "missing: rank 1" in text_0


# A sequence of groups on one port. A rank may come to the next group while rank 0 still ends the
# one before.


def _sequence(here, rounds):
    with here.group("first") as group:
        port = group.port
    gathered = []
    for number in range(rounds):
        with create(port, here.rank, here.world_size, store_timeout=30) as group:
            gathered.append(group.all_gather_obj((number, here.rank)))
    return gathered


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sequence_of_groups_on_one_port(world_size):
    for gathered in run_ranks(_sequence, world_size, 10):
        assert gathered == [[(n, r) for r in range(world_size)] for n in range(10)]


# The same without closing: a group ends when nothing refers to it. Rank 1 comes to the next group
# while rank 0 is still in the one before, where rank 1 is known: it tries again.


def _come_too_early(here):
    group = here.group("first")
    port = group.port
    if here.rank == 0:
        here.ask("rank 1 tries again")
    else:

        def sleep(seconds):
            here.tell("rank 1 tries again")
            time.sleep(seconds)

        rendezvous.time = SimpleNamespace(sleep=sleep)
    del group
    with create(port, here.rank, 2, store_timeout=30) as group:
        return group.all_gather_obj(here.rank)


def test_a_rank_that_comes_before_the_last_group_ended():
    assert run_ranks(_come_too_early, 2) == [[0, 1]] * 2


# Closing. Rank 0 returns after the others have said that they leave.


def _close(here):
    group = here.group()
    if here.rank != 0:
        here.tell(f"closing/{here.rank}")
    else:
        here.ask("closing/1")  # one is on its way; the other may be late
    group.close()
    group.close()
    return [here.told(f"closing/{rank}") for rank in range(1, here.world_size)]


def test_rank_0_closes_last_and_twice_is_once():
    assert run_ranks(_close, 4)[0] == [True, True, True]


# Rank 2 does not close. Rank 0: an error that names it, and its group is closed. Rank 2: whatever
# it does next finds that the store is gone.


def _close_without_rank_2(here):
    group = here.group()
    if here.rank == 2:
        here.ask("store is gone")
        with pytest.raises(StoreConnectionError, match="barrier: rank 2 lost the store that rank"):
            group.barrier()
        here.tell("rank 2 has seen it")
        group.close()
        return None
    if here.rank == 1:
        group.close()
        return None
    start = time.monotonic()
    with pytest.raises(BarrierError) as caught:
        group.close(timeout=1)
    seconds = time.monotonic() - start
    here.tell("store is gone")
    with pytest.raises(ValueError, match="barrier: this group is closed"):
        group.barrier()
    group.close()
    here.ask("rank 2 has seen it")  # while the error is kept here
    return caught.value, seconds


def test_close_names_who_did_not_leave():
    error, seconds = run_ranks(_close_without_rank_2, 3)[0]
    assert "waited in vain for rank 2 to close it" in str(error)
    assert (error.phase, error.missing, error.allowed) == ("departure", (2,), 1)
    assert error.completed
    assert 0.9 < error.elapsed <= seconds < 1 + SLACK


@pytest.mark.parametrize(
    "use",
    [
        lambda group: group.barrier(),
        lambda group: group.send_obj(1, 1),
        lambda group: group.recv_obj(1),
        lambda group: group.broadcast_obj(1, 0),
        lambda group: group.broadcast_obj(None, 1),
        lambda group: group.all_gather_obj(1),
        lambda group: group.expire_data(),
        lambda group: group.host,
        lambda group: group.port,
    ],
)
def test_use_after_close_is_an_error(use):
    group = StatelessProcessGroup(0, 2, create_tcp_store(LOCAL, 0, is_master=True))
    group.close(timeout=0)
    with pytest.raises(ValueError, match="this group is closed"):
        use(group)


# The block of rank 0 raises: it leaves at once, although nobody else does, and the error stays.
def test_an_error_in_the_block_is_not_hidden():
    store = create_tcp_store(LOCAL, 0, is_master=True)
    start = time.monotonic()
    with pytest.raises(KeyError, match="mine"), StatelessProcessGroup(0, 2, store) as group:
        raise KeyError("mine")
    assert time.monotonic() - start < SLACK
    with pytest.raises(ValueError, match="this group is closed"):
        group.barrier()


# The same while another thread waits in a call: the group stays open, and that thread gets what it
# waits for.
def test_an_error_in_the_block_is_not_hidden_by_another_thread():
    server = create_tcp_store(LOCAL, 0, is_master=True)
    waits = threading.Event()
    store = Watched(
        create_tcp_store(LOCAL, server.port), lambda request, *_: request == "wait" and waits.set()
    )
    received = []
    zero, one = StatelessProcessGroup(0, 2, server), StatelessProcessGroup(1, 2, store)
    thread = threading.Thread(target=lambda: received.append(one.recv_obj(0)), daemon=True)
    thread.start()
    assert waits.wait(SLACK)
    with pytest.raises(KeyError, match="mine"), one:
        raise KeyError("mine")
    zero.send_obj("comes", 1)
    thread.join(2 * SLACK)
    assert received == ["comes"]
    one.close()
    with pytest.raises(ValueError, match="this group is closed"):
        one.barrier()


# Groups on a store of the caller's.


def _use_store(rank, store):
    group = StatelessProcessGroup(rank, 3, store)
    group.barrier(SLACK)
    return group.all_gather_obj(rank)


def test_any_store_will_do():
    assert run_threads(_use_store, 3, HashStore()) == [[0, 1, 2]] * 3


# Two groups of the same two ranks on one store, each with a prefix. In step, with the same numbers
# in their keys, each hears only itself.


def _use_two_prefixes(rank, store):
    groups = {name: StatelessProcessGroup(rank, 2, PrefixStore(name, store)) for name in "ab"}
    heard = {}
    for name, group in groups.items():
        if rank == 0:
            group.send_obj(f"{name} message", 1)
            group.broadcast_obj(f"{name} broadcast", 0)
    for name, group in reversed(groups.items()):
        group.barrier(SLACK)
        heard[name] = group.all_gather_obj((name, rank))
        if rank == 1:
            heard[name] += [group.recv_obj(0), group.broadcast_obj(None, 0)]
    return heard


def test_groups_with_prefixes_do_not_see_each_other():
    first, second = run_threads(_use_two_prefixes, 2, HashStore())
    for name in "ab":
        assert first[name] == [(name, 0), (name, 1)]
        assert second[name] == [(name, 0), (name, 1), f"{name} message", f"{name} broadcast"]


# Rank 1 does without Store.barrier, or rank 0 does, as an older torch would: the two could not meet
# in a barrier. Rank 1 is told why, and rank 0 misses it.


def _come_without_store_barrier(here, without):
    switched_off = torch_versions.switched_off(torch_versions.STORE_BARRIER)
    with here.place("group") as (port, listener):
        here.meet("start")
        with switched_off if here.rank == without else nullcontext():
            try:
                create(port, here.rank, 2, store_timeout=2, listen_socket=listener)
            except (ValueError, GroupCreationError) as error:
                return type(error), str(error)


@pytest.mark.skipif(
    not torch_versions.store_features()[torch_versions.STORE_BARRIER],
    reason="this torch has no Store.barrier",
)
@pytest.mark.parametrize("without", [0, 1])
def test_only_one_rank_has_store_barrier(without):
    (kind_0, text_0), (kind_1, text_1) = run_ranks(_come_without_store_barrier, 2, without)
    assert kind_0 is GroupCreationError and "missing: rank 1" in text_0
    version = re.escape(torch.__version__)
    assert kind_1 is ValueError
    assert re.match(rf"torch {version}: rank 0 on {LOCAL}:\d+ has torch {version}, and on", text_1)
    assert "Store.barrier; all ranks must have it, or none" in text_1


def test_host_and_port_need_a_tcp_store():
    group = StatelessProcessGroup(0, 1, HashStore())
    with pytest.raises(ValueError, match="store=HashStore: is no TCPStore, so it has no address"):
        group.port  # noqa: B018
    tcp_store = create_tcp_store(LOCAL, 0, is_master=True)
    prefixed = StatelessProcessGroup(0, 1, PrefixStore("a", PrefixStore("b", tcp_store)))
    assert (prefixed.host, prefixed.port) == (LOCAL, tcp_store.port)


def test_fields_of_the_specification():
    expected = {
        "rank": 1,
        "world_size": 2,
        "store": None,
        "socket": None,
        "data_expiration_seconds": 3600,
        "send_dst_counter": {0: 0, 1: 0},
        "recv_src_counter": {0: 0, 1: 0},
        "broadcast_send_counter": 0,
        "broadcast_recv_src_counter": {0: 0, 1: 0},
        "entries": deque(),
    }
    names = [field.name for field in dataclasses.fields(StatelessProcessGroup)]
    assert names[: len(expected)] == list(expected)
    assert names[len(expected) :] == ["events", "messages"]
    store = HashStore()
    group = StatelessProcessGroup(1, 2, store, None)
    for name, value in (expected | {"store": store}).items():
        assert getattr(group, name) == value, name
    other = StatelessProcessGroup(1, 2, store, None)
    assert other.entries is not group.entries
    assert other.send_dst_counter is not group.send_dst_counter


# create_tcp_store: the store alone.


def test_store_serves_and_connects():
    server = create_tcp_store("::1", 0, is_master=True, timeout=timedelta(seconds=20))
    client = create_tcp_store("[::1]", server.port, timeout=timedelta(seconds=20))
    client.set("key", "value")
    assert server.get("key") == b"value"
    assert client.timeout == timedelta(seconds=20)


# The server waits for two workers: it answers when the second has come.
def test_store_waits_for_workers():
    limit = timedelta(seconds=20)
    with socket.socket() as listener:
        listener.bind((LOCAL, 0))
        listener.listen()
        port = listener.getsockname()[1]
        stores = []
        options = {"world_size": 2, "wait_for_workers": True, "timeout": limit}

        def serve():
            stores.append(
                create_tcp_store(LOCAL, port, listen_socket=listener, is_master=True, **options)
            )

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        client = create_tcp_store(LOCAL, port, **options)
        server.join(20)
    client.set("key", "value")
    assert stores[0].get("key") == b"value"


# What os.environ gives is refused by name: it is a string. So is a float, and a timedelta.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": "0"}, "rank='0': must be an integer, not str"),
        ({"rank": 0.0}, "rank=0.0: must be an integer, not float"),
        ({"world_size": "1"}, "world_size='1': must be an integer, not str"),
        ({"port": "29500"}, "port='29500': must be an integer, not str"),
        ({"host": None}, "host=None: must name one address"),
        ({"store_timeout": None}, "store_timeout=None: must be a number of seconds, not NoneType"),
        (
            {"store_timeout": timedelta(seconds=1)},
            "store_timeout=datetime.timedelta(seconds=1): must be a number of seconds",
        ),
        ({"data_expiration_seconds": "1"}, "data_expiration_seconds='1': must be a number"),
    ],
    ids=str,
)
def test_wrong_types(arguments, message):
    valid = {"host": LOCAL, "port": 0, "rank": 0, "world_size": 1}
    with pytest.raises(ValueError, match=re.escape(message)):
        StatelessProcessGroup.create(**(valid | arguments))


def test_an_unbound_listen_socket():
    with socket.socket() as unbound, pytest.raises(ValueError, match="is not bound to a port"):
        StatelessProcessGroup.create(LOCAL, 0, 0, 1, listen_socket=unbound)


# A rank that is True or of another integer type is the rank that it equals.


def _ranks_of_other_types(here):
    with here.group() as group:
        if here.rank == 0:
            group.send_obj("first", True)
            group.send_obj("second", 1)
            with pytest.raises(ValueError, match=re.escape("dst=1.0: must be an integer")):
                group.send_obj("third", 1.0)
            return None
        return [group.recv_obj(False), group.recv_obj(0)]


def test_ranks_of_other_types():
    assert run_ranks(_ranks_of_other_types, 2)[1] == ["first", "second"]
