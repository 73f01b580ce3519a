"""Processes that a running group lets in: new ones, and those that restarted.

Ranks are processes. The last ones of each test ask, and the others are the group.
"""

import json
import os
from contextlib import nullcontext, suppress

import pytest
from ranks import LOCAL, interrupt, run_ranks, until
from test_shrinking import _die, _error, _run_all, _watch

from refdist import (
    AuthenticationError,
    BarrierError,
    GroupCreationError,
    MessageError,
    MessageTimeoutError,
    StatelessProcessGroup,
    StoreConnectionError,
    create_tcp_store,
    torch_versions,
)
from refdist.joining.asking import Plan
from refdist.store import keys
from refdist.store.listening import listen

SECRET = "a secret of tests for all ranks"
TIMEOUT = 1.5  # of a meeting: a rank that is alive comes in that time, also on a busy machine

# These tests start many processes, so they run one after the other.
pytestmark = pytest.mark.xdist_group("shrinking")


def _member(here, size, **options):
    """A group of the first ranks, which tells the others where it is."""
    group = here.group(members=range(size), **options)
    here.tell("place", (group.host, group.port))
    return group


def _ask(here, **options):
    """Ask the group to let this process in."""
    options = {"timeout": 20} | options
    return StatelessProcessGroup.join(*here.ask("place"), **options)


def _plan(**changes):
    """A plan of a group of two as a stranger may write it."""
    plan = Plan(1, "", 1, "era/1/", [None, None], ["00", "11"], 300.0)._replace(**changes)
    return json.dumps(plan).encode()


def _until_asked(group, count):
    """Wait until so many processes have asked, and nobody has answered."""
    store = group._connection.client
    until(lambda: all(store.check([keys.ask(number)]) for number in range(count)))


def _use(here, group):
    """All ranks gather and exchange messages. The store is the same for each of them."""
    back, there = (group.rank - 1) % group.world_size, (group.rank + 1) % group.world_size
    group.send_obj(here.rank, there)
    told = group.successor, group.host, group.port, group.store.timeout.total_seconds()
    found = group.all_gather_obj((here.rank, told))
    members = [rank for rank, _ in found]
    assert len({place for _, place in found}) == 1
    assert members[group.rank] == here.rank and group.recv_obj(back) == members[back]
    return members


# Nobody asks: then it is a barrier, and the group is the same. One process asks, or several: they
# get the last ranks, in a group that is the same for all. The old one is closed, and its messages
# are not read.


def _let_in(here, size, options):
    if here.rank < size:
        group = _member(here, size, **options)
        assert group.admit() is group and group.generation == 2
        if size > 1:
            group.send_obj("of the old group", (group.rank + 1) % size)
        here.tell("nobody has asked")
        _until_asked(group, here.world_size - size)
        group.barrier()
        new = group.admit()
        assert new is not group
        assert str(_error(group.barrier)) == "barrier: this group is closed"
        assert (new.socket is not None) == (here.rank == 0)
    else:
        here.ask("nobody has asked")
        new = _ask(here, **options)
    found = _use(here, new)
    assert new.admit() is new
    with new.split(new.rank % 2) as part:
        assert part.all_gather_obj(new.rank) == list(range(new.rank % 2, new.world_size, 2))
    new.close()
    return found


def _check_let_in(case, results):
    world_size, (size, _), _ = case
    assert all(one == results[0] for one in results)
    assert results[0][:size] == list(range(size)) and sorted(results[0]) == list(range(world_size))


def test_letting_in():
    plain, secret = {"messages": "plain"}, {"secret": SECRET}
    sizes = [(3, 2, {}), (5, 3, {}), (3, 2, secret | plain), (4, 2, secret), (2, 1, plain)]
    _run_all(_let_in, _check_let_in, [(world, (size, of), ()) for world, size, of in sizes])


# One that asks gives up, because its time is up or it is interrupted, before anybody answers: the
# group does not wait for it. The next one is let in.


def _gives_up(here, how):
    if here.rank < 2:
        group = _member(here, 2)
        if here.rank == 0 and how == "interrupt":
            _until_asked(group, 1)
            interrupt(here.ask("process"))
        here.ask("gave up")
        assert group.admit(timeout=20) is group
        here.tell("next")
        while group.world_size < 3:
            group = group.admit()
    elif here.rank == 2:
        here.tell("process", os.getpid())
        if how == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                _ask(here)
        else:
            error, (host, port) = _error(lambda: _ask(here, timeout=1)), here.ask("place")
            assert isinstance(error, GroupCreationError)
            assert str(error) == (
                f"no group on {host}:{port} let this process in within 1 s; do all its ranks "
                f"call admit?"
            )
        here.tell("gave up")
        return [0, 1, 3]
    else:
        here.ask("next")
        group = _ask(here)
    found = _use(here, group)
    group.close()
    return found


def test_one_that_asks_gives_up():
    def check(case, results):
        assert results == [[0, 1, 3]] * 4

    _run_all(_gives_up, check, [(4, (how,), ()) for how in ("time", "interrupt")])


# One that has asked is killed: before there is an answer, or when it has read that. The group waits
# for it in vain, and goes on as it was. It may shrink then, and it lets the next one in.


def _is_killed(here, moment, shrinks):
    if here.rank == 2:

        def before(key):
            if key.startswith("era/" if moment == "after" else keys.answer(0)):
                _die()

        _watch(before)
        _ask(here)
    elif here.rank == 3:
        here.ask("next")
        group = _ask(here)
    else:
        group = _member(here, 2)
        _until_asked(group, 1)
        group.barrier()
        error = _error(lambda: group.admit(TIMEOUT))
        assert isinstance(error, GroupCreationError) and error.missing == (2,), error
        assert str(error).startswith(
            "nobody was let in, and the group goes on as it was: of the 3 ranks of the new one, "
            "rank 2 did not come ("
        )
        assert group.all_gather_obj(here.rank) == [0, 1]
        if shrinks:
            group = group.shrink(TIMEOUT)
        assert group.admit() is group
        here.tell("next")
        while group.world_size < 3:
            group = group.admit()
    found = _use(here, group)
    group.close()
    return found


def test_one_that_has_asked_is_killed():
    def check(case, results):
        assert results == [[0, 1, 3], [0, 1, 3], None, [0, 1, 3]]

    cases = [("before", False), ("after", True)]
    _run_all(_is_killed, check, [(4, case, (2,)) for case in cases])


# A rank of the group is killed, and so the others cannot let anybody in. They shrink, and call
# admit again: then the process that has asked is let in, which has waited all the time.


def _a_member_is_killed(here):
    if here.rank == 3:
        group = _ask(here)
    else:
        group = _member(here, 3)
        _until_asked(group, 1)
        group.barrier()
        if here.rank == 2:
            _die()
        error = _error(lambda: group.admit(timeout=0.3))
        assert isinstance(error, BarrierError) and error.missing == (2,)
        group = group.shrink(TIMEOUT)
        group = group.admit()
    found = _use(here, group)
    group.close()
    return found


def test_a_rank_of_the_group_is_killed():
    assert run_ranks(_a_member_is_killed, 4, killed=[2]) == [[0, 1, 3], [0, 1, 3], None, [0, 1, 3]]


# It is told soon that it has another secret than the group, or that only one of them has one, and
# that its torch does not fit. The group does not wait for it.


def _does_not_fit(here, of_group, own, text):
    if here.rank == 0:
        group = _member(here, 1, **of_group)
        if "torch" in text:
            _until_asked(group, 1)
            assert group.admit() is group
        here.ask("told")
        assert group.admit(timeout=20) is group
        group.close()
        return None
    old = torch_versions.switched_off(torch_versions.STORE_BARRIER)
    with old if "torch" in text else nullcontext():
        error = _error(lambda: _ask(here, **own))
    here.tell("told")
    host, port = here.ask("place")
    assert isinstance(error, GroupCreationError)
    assert str(error).startswith(text.format(where=f"{host}:{port}")), error
    return None


def test_one_that_does_not_fit():
    lacks = "this process has %s, but rank 0 on {where} has %s; give all ranks the same"
    cases = [
        (
            {"secret": SECRET},
            {"secret": SECRET * 2},
            "this process has another secret than rank 0 on {where} (",
        ),
        ({"secret": SECRET}, {}, lacks % ("no secret", "one")),
        ({}, {"secret": SECRET}, lacks % ("a secret", "none")),
    ]
    if torch_versions.store_features()[torch_versions.STORE_BARRIER]:
        cases.append(({}, {}, "the group on {where} does not let this process in: torch "))
    _run_all(_does_not_fit, lambda *_: None, [(2, case, ()) for case in cases])


# The store that a successor opened says what secret its group has, as the first one does.


def _another_secret_at_the_successor(here):
    if here.rank < 2:
        group = here.group(members=range(2), secret=SECRET)
        successor = group.successor
        if here.rank == 0:
            _die()
        assert isinstance(_error(group.barrier), StoreConnectionError)
        group = group.shrink(TIMEOUT)
        here.tell("place", successor)
        here.ask("told")
        return
    error = _error(lambda: _ask(here, secret=SECRET * 2, timeout=1))
    here.tell("told")
    assert str(error).startswith("this process has another secret than rank 0 on "), error


def test_another_secret_at_the_successor():
    run_ranks(_another_secret_at_the_successor, 3, killed=[0])


# Where no group is, it learns that in time.


def test_no_group():
    with pytest.raises(ValueError, match=r"^timeout=0: must be above 0 seconds$"):
        StatelessProcessGroup.join(LOCAL, 1, timeout=0)
    with pytest.raises(ValueError, match=r"^messages='json'"):
        StatelessProcessGroup.join(LOCAL, 1, messages="json")
    with pytest.raises(OSError, match="does not resolve"):
        StatelessProcessGroup.join("no such host.invalid", 1)
    store = create_tcp_store(LOCAL, 0, is_master=True)
    with pytest.raises(GroupCreationError, match=f"no group on {LOCAL}:{store.port} let this"):
        StatelessProcessGroup.join(LOCAL, store.port, timeout=1)
    port = store.port
    del store
    with pytest.raises(StoreConnectionError, match=f"no store answered on {LOCAL}:{port}"):
        StatelessProcessGroup.join(LOCAL, port, timeout=0.2)


# Where the group ends before it has let the process in, it learns that too.


def _the_group_ends(here):
    if here.rank == 0:
        group = _member(here, 1)
        _until_asked(group, 1)
        group.close()
        return
    error = _error(lambda: _ask(here))
    assert isinstance(error, StoreConnectionError) and "lost the store" in str(error)


def test_the_group_ends():
    run_ranks(_the_group_ends, 2)


# What a stranger writes in place of an ask is passed over, and so is one that died before it wrote
# any, also if there are more than one call looks at. Those that ask properly are let in.


def _rubbish(here):
    if here.rank == 0:
        group = _member(here, 1)
        addresses = ["5", '["host"]', '["host", 1e999]', '["host", 70000]']
        rubbish = ["", "rubbish", "[1, 2]", *(f'["token", {one}, true]' for one in addresses)]
        for number, text in enumerate(rubbish):
            group.store.set(keys.ask(number), text)
        group.store.add(keys.asked(), 600)  # of the others there is nothing
        here.tell("written")
        while group.world_size < 2:
            group = group.admit(timeout=5)
    else:
        here.ask("written")
        group = _ask(here)
    found = group.all_gather_obj(here.rank)
    group.close()
    return found


def test_a_stranger_asks():
    assert run_ranks(_rubbish, 2) == [[0, 1]] * 2


# One whose ask arrives after rank 0 has looked for it in vain asks again.


def _asks_late(here):
    if here.rank == 0:
        group = _member(here, 1)
        here.ask("counted")
        assert group.admit() is group
        here.tell("looked")
        while group.world_size < 2:
            group = group.admit(timeout=20)
    else:

        def before(key):
            if key == keys.ask(0):
                here.tell("counted")
                here.ask("looked")

        _watch(before)
        group = _ask(here)
    found = _use(here, group)
    group.close()
    return found


def test_an_ask_that_is_late():
    assert run_ranks(_asks_late, 2) == [[0, 1]] * 2


# A stranger adds a lot to the count of those that ask: the group does not look for all of them.


def test_a_stranger_counts():
    with (
        listen(LOCAL, 0) as listener,
        StatelessProcessGroup.create(
            LOCAL, listener.getsockname()[1], 0, 1, listen_socket=listener, secret=SECRET
        ) as group,
    ):
        group.store.add(keys.asked(), 10**12)
        assert group.admit() is group


# A rank is interrupted while they wait for the process that they let in. Then nobody is let in, and
# all know it; the next time, it is.


def _interrupted(here):
    if here.rank == 3:
        process = here.ask("process")
        here.ask("answered")
        interrupt(process)
        return None
    if here.rank == 2:

        def before(key):
            if key.startswith("era/") and not here.told("answered"):
                here.tell("answered")
                here.ask("interrupted")

        _watch(before)
        group = _ask(here)
    else:
        group = _member(here, 2)
        _until_asked(group, 1)
        group.barrier()
        if here.rank == 1:
            here.tell("process", os.getpid())
            with pytest.raises(KeyboardInterrupt):
                group.admit(timeout=20)
            here.tell("interrupted")
        else:
            error = _error(lambda: group.admit(timeout=20))
            assert isinstance(error, GroupCreationError) and error.missing == (1,)
        while group.world_size < 3:
            with suppress(GroupCreationError):
                group = group.admit()
    found = _use(here, group)
    group.close()
    return found


def test_an_interrupt():
    assert run_ranks(_interrupted, 4) == [[0, 1, 2]] * 3 + [None]


# The process that asks is interrupted, and is let in before it has taken its ask back: the others
# do not wait for it. When it asks again, it is let in.


def _asks_and_is_interrupted(here):
    if here.rank == 2:

        def before(key):
            if key == keys.answer(0) and not here.told("interrupted"):
                here.tell("interrupted")
                interrupt(os.getpid())
            elif key == keys.answer(0):
                here.ask("answered")

        _watch(before)
        with pytest.raises(KeyboardInterrupt):
            _ask(here)
        group = _ask(here)
    else:
        if here.rank == 0:
            _watch(lambda key: key.startswith("era/") and here.tell("answered"))
        group = _member(here, 2)
        here.ask("interrupted")
        _until_asked(group, 1)
        error = _error(lambda: group.admit(timeout=20))
        assert isinstance(error, GroupCreationError) and "KeyboardInterrupt" in str(error), error
        while group.world_size < 3:
            group = group.admit()
    found = _use(here, group)
    group.close()
    return found


def test_one_that_asks_is_interrupted():
    assert run_ranks(_asks_and_is_interrupted, 3) == [[0, 1, 2]] * 3


# It is interrupted when all have come to the meeting. The others have the new group, and learn in
# its first barrier, at once, that it has left.


def _is_let_in_and_interrupted(here):
    if here.rank == 2:

        def before(key):
            if key.startswith("era/") and key.endswith("counter"):
                for rank in range(2):
                    here.ask(f"arrived {rank}")
                interrupt(os.getpid())

        _watch(before)
        with pytest.raises(KeyboardInterrupt):
            _ask(here)
        return
    group = _member(here, 2)
    _until_asked(group, 1)
    group.barrier()

    def arrived(key):
        if key.startswith("era/") and key.endswith("outcome"):
            here.tell(f"arrived {here.rank}")

    _watch(arrived)
    group = group.admit(timeout=60)
    assert group.world_size == 3
    error = _error(lambda: group.barrier(timeout=60))
    assert isinstance(error, BarrierError) and error.missing == (2,), error
    assert "rank 2" in str(error) and "it left the group because of KeyboardInterrupt" in str(error)
    here.tell(f"learned {here.rank}")
    here.ask("learned 1")  # rank 0 has the store


def test_one_that_was_let_in_is_interrupted():
    run_ranks(_is_let_in_and_interrupted, 3)


# It gives up just before rank 0 answers: rank 0 sees that, and nobody waits for it.


def _gives_up_at_last(here):
    if here.rank == 2:
        assert isinstance(_error(lambda: _ask(here, timeout=1)), GroupCreationError)
        here.tell("gave up")
        return
    group = _member(here, 2)
    _until_asked(group, 1)
    group.barrier()
    if here.rank == 0:
        _watch(lambda key: here.ask("gave up") if key == keys.answer(0) else None)
    error = _error(lambda: group.admit(timeout=60))
    assert isinstance(error, GroupCreationError) and error.missing == (2,), error
    assert "a process that had asked has given up" in str(error)
    group.close()


def test_one_that_gives_up_at_last():
    run_ranks(_gives_up_at_last, 3)


# A process that was let in leaves, and the others shrink. It comes again, and then it is killed and
# comes as another process. What was sent to it in its earlier lives is never read.


def _comes_again(here):
    if here.rank < 2:
        group = _member(here, 2)
        for life in range(3):
            while group.world_size < 3:
                group = group.admit()
            group.send_obj(("for life", life), 2)
            group.barrier()
            if life < 2:
                with pytest.raises(BarrierError):
                    group.barrier(timeout=0.3)
                here.tell(f"{here.rank} shrinks {life}")
                for rank in range(2):
                    here.ask(f"{rank} shrinks {life}")
                group = group.shrink(TIMEOUT)
                assert group.world_size == 2
                here.tell(f"shrunk {life}")
    else:
        lives = range(2) if here.rank == 2 else range(2, 3)
        for life in lives:
            if life:
                here.ask(f"shrunk {life - 1}")
            group = _ask(here)
            if life == 2:
                assert [group.recv_obj(rank) for rank in range(2)] == [("for life", 2)] * 2
            group.barrier()
            if life == 0:
                group.close()
            if life == 1:
                _die()
        assert isinstance(_error(lambda: group.recv_obj(0, timeout=0.1)), MessageTimeoutError)
    found = _use(here, group)
    group.close()
    return found


def test_a_process_comes_again():
    assert run_ranks(_comes_again, 4, killed=[2]) == [[0, 1, 3], [0, 1, 3], None, [0, 1, 3]]


# The host of the store is killed, and later the host after it, which was let in before. Each time,
# the others go on at the successor, and let a process in there. It has the group's attributes.


def _heals_twice(here):
    first = max(0, here.rank - 2)
    if here.rank < 2:
        group = _member(here, 2, secret=SECRET)
        here.tell("place/0", (group.host, group.port))
    else:
        place = here.ask(f"place/{first}")
        group = StatelessProcessGroup.join(*place, timeout=30, secret=SECRET)
        assert (group.host, group.port) == place
    for host in range(first, 3):
        while group.world_size < 3:
            group = group.admit()
        assert _use(here, group) == [host, host + 1, host + 2]
        here.tell(f"used/{host}/{here.rank}")
        if host == 2:
            break
        successor = group.successor
        if here.rank == host:
            for other in (host + 1, host + 2):
                here.ask(f"used/{host}/{other}")
            _die()
        with pytest.raises(StoreConnectionError):
            group.barrier()
        group = group.shrink(TIMEOUT)
        assert group.world_size == 2 and (group.host, group.port) == successor
        assert (group.socket is not None) == (here.rank == host + 1)
        here.tell(f"place/{host + 1}", successor)
    group.close()
    return True


def test_the_hosts_are_killed():
    assert run_ranks(_heals_twice, 5, killed=[0, 1]) == [None, None, True, True, True]


# Someone who writes to the store answers in place of rank 0: with what is no plan, or with the plan
# of an earlier admission, which names other tokens. The process that asks does not go along.


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (b"[1, 2]", MessageError, r"the group on .* told '\[1, 2\]', which is no plan of a group"),
        (b"{}", MessageError, "which is no plan of a group"),
        (b"\xff", MessageError, "told 'None', which is no plan of a group"),
        (_plan(), AuthenticationError, "answer/0: is the answer to another ask"),
        *(
            (_plan(**wrong), MessageError, "which is no plan of a group")
            for wrong in [{"rank": 2}, {"rank": -1}, {"tokens": ["00", 1]}, {"seconds": 0.0}]
        ),
        (_plan(addresses=[None, ["host"]]), MessageError, r"\['host'\].{1,2}is no address"),
    ],
)
def test_a_strangers_answer(answer, error, text):
    store = create_tcp_store(LOCAL, 0, is_master=True)
    store.set(keys.answer(0), answer)
    store.get(keys.answer(0))  # set does not wait
    with pytest.raises(error, match=text):
        StatelessProcessGroup.join(LOCAL, store.port, timeout=20)


# One that is told again and again to ask once more ends in time.


def test_asking_again_ends_in_time():
    store = create_tcp_store(LOCAL, 0, is_master=True)
    again = json.dumps("rank 0 could not read who asks")
    for number in range(50000):
        store.set(keys.answer(number), again)
    store.get(keys.answer(number))  # set does not wait
    with pytest.raises(GroupCreationError, match="in: rank 0 could not read who asks"):
        StatelessProcessGroup.join(LOCAL, store.port, timeout=1)
    assert 0 < store.add(keys.asked(), 0) < 50000


# What asked an earlier group, of the same secret, is passed over.


def test_an_ask_of_an_earlier_group():
    def group():
        return StatelessProcessGroup.create(LOCAL, 0, 0, 1, secret=SECRET)

    with group() as earlier:
        with pytest.raises(GroupCreationError, match="do all its ranks call admit"):
            StatelessProcessGroup.join(LOCAL, earlier.port, timeout=1, secret=SECRET)
        asked = earlier.store.get(keys.ask(0))
    with group() as later:
        later.store.set(keys.ask(0), asked)
        later.store.add(keys.asked(), 1)
        assert later.admit() is later


# With a secret, someone without it writes over the outcome of the meeting before rank 1 has read
# it. Rank 1 cannot know how it ended, so its group is closed, and it forms none with others.


def _forged_outcome(here):
    if here.rank == 2:
        group = _ask(here, secret=SECRET)
        here.tell("admitted 2")
    else:
        group = _member(here, 2, secret=SECRET)
        _until_asked(group, 1)
        store = create_tcp_store(LOCAL, group.port)

        def before(key):
            if key.startswith("era/") and key.endswith("outcome") and not here.told("forged"):
                here.ask("admitted 0")
                here.ask("admitted 2")
                store.set(key, "forged")
                store.get(key)  # set does not wait
                here.tell("forged")

        if here.rank == 1:
            _watch(before)
            error = _error(lambda: group.admit(timeout=20))
            assert isinstance(error, BarrierError) and error.missing == (), error
            assert str(_error(group.shrink)) == "shrink: this group is closed"
            return None
        group = group.admit(timeout=20)
        here.tell("admitted 0")
    here.ask("forged")
    error = _error(lambda: group.barrier(timeout=0.3))
    assert isinstance(error, BarrierError) and error.missing == (1,), error
    group = group.shrink(TIMEOUT)
    found = _use(here, group)
    group.close()
    return found


def test_a_stranger_forges_the_outcome():
    assert run_ranks(_forged_outcome, 3) == [[0, 2], None, [0, 2]]
