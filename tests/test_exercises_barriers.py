"""The checks of notebook 05 refuse what is wrong, and accept what is right."""

import json
import re
import time
from collections import namedtuple
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import DistStoreError

from refdist.lab.exercises import UnsolvedError, barriers

ROOT = Path(__file__).parent.parent
SECOND = timedelta(seconds=1)
cells = json.loads((ROOT / "notebooks" / "05_every_interleaving.ipynb").read_text())["cells"]
SOURCES = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def solved(*names):
    """The objects of these names, as the notebook defines them."""
    space = {"timedelta": timedelta, "DistStoreError": DistStoreError, "SECOND": SECOND}
    for source in SOURCES:
        if re.search(rf"^(class|def) ({'|'.join(names)})\b", source, re.MULTILINE):
            exec(source.split("\nfor answers in")[0], space)
    return [space[name] for name in names]


def refused(check, *answers, match):
    with pytest.raises(UnsolvedError, match=match):
        check(*answers)


def stub(*_):
    raise NotImplementedError


class Stub:
    def __init__(self, *_):
        pass

    def wait(self):
        raise NotImplementedError


def test_stubs_are_not_written_yet():
    for check in (barriers.search, barriers.numbered_doors, barriers.decided):
        refused(check, stub, match=r"^Exercise 5\.\d .*not written yet")
    (decided,) = solved("decided")
    refused(barriers.depart, decided, stub, match=r"^Exercise 5\.4 .*not written yet")
    refused(barriers.my_barrier, Stub, match=r"^Exercise 5\.5 .*not written yet")


def test_an_error_of_the_answer_is_told():
    def slips(store, rank, world_size, number):
        store.add("arrived")

    refused(barriers.numbered_doors, slips, match=r"your code raised TypeError: .*add")


# 5.1


def tools():
    Tools = namedtuple("Tools", "next_request serve search")
    names = ("Pause", "Recorded", "next_request", "as_bytes", "serve", "search")
    return Tools(*(solved(*names)[place] for place in (2, 4, 5)))


def searched(merge=True, first=True, ranks=None):
    """A search that keeps every schedule apart, or finds a long one, or forgets some ranks."""
    next_request, serve, _ = tools()

    def search(protocol, world_size, holds):
        layer, states = [((), ((),) * world_size, "")], 0
        while layer:
            following = {}
            for memory, answers, taken in layer if first else layer[::-1]:
                states += 1
                requests = [
                    next_request(protocol, r, world_size, answers[r]) for r in range(world_size)
                ]
                if not holds(requests, answers):
                    return taken if first else taken + "0", states
                for rank, request in list(enumerate(requests))[:ranks]:
                    after = dict(memory)
                    if request is None or (answer := serve(after, *request)) == "waits":
                        continue
                    told = (*answers[:rank], (*answers[rank], answer), *answers[rank + 1 :])
                    key = (tuple(sorted(after.items())), told)
                    following[key if merge else taken + str(rank)] = (*key, taken + str(rank))
            layer = list(following.values())
        return None, states

    return search


def test_the_search_of_the_notebook_is_right_and_so_is_another(capsys):
    barriers.search(tools().search)
    barriers.search(searched())
    assert "64 states of 3 ranks in 192 runs" in capsys.readouterr().out


def by_answers(protocol, world_size, holds):
    """Takes states for the same whose answers are."""
    next_request, serve, _ = tools()
    layer, states = {((),) * world_size: ((), "")}, 0
    while layer:
        following = {}
        states += len(layer)
        for answers, (memory, taken) in layer.items():
            requests = [
                next_request(protocol, r, world_size, answers[r]) for r in range(world_size)
            ]
            if not holds(requests, answers):
                return taken, states
            for rank, request in enumerate(requests):
                after = dict(memory)
                if request is None or (answer := serve(after, *request)) == "waits":
                    continue
                told = (*answers[:rank], (*answers[rank], answer), *answers[rank + 1 :])
                following.setdefault(told, (tuple(sorted(after.items())), taken + str(rank)))
        layer = following
    return None, states


def depth_first(protocol, world_size, holds):
    next_request, serve, _ = tools()
    todo, seen = [((), ((),) * world_size, "")], set()
    while todo:
        memory, answers, taken = todo.pop()
        if (memory, answers) in seen:
            continue
        seen.add((memory, answers))
        requests = [next_request(protocol, r, world_size, answers[r]) for r in range(world_size)]
        if not holds(requests, answers):
            return taken, len(seen)
        for rank, request in enumerate(requests):
            after = dict(memory)
            if request is None or (answer := serve(after, *request)) == "waits":
                continue
            told = (*answers[:rank], (*answers[rank], answer), *answers[rank + 1 :])
            todo.append((tuple(sorted(after.items())), told, taken + str(rank)))
    return None, len(seen)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (by_answers, "Memories may differ"),
        (depth_first, "shorter schedules come first"),
        (lambda *_: (None, 0), "1 ranks with 1 requests each: returned .None, 0., wanted"),
        (searched(merge=False), "2 ranks with 1 requests each: returned"),
        (searched(ranks=1), "2 ranks with 1 requests each: returned"),
        (searched(first=False), "wanted '110'"),
    ],
    ids=[
        "by answers",
        "depth first",
        "a constant",
        "every schedule apart",
        "rank 0 alone",
        "a longer schedule",
    ],
)
def test_a_wrong_search(answer, match):
    refused(barriers.search, answer, match=match)


# 5.2


def doors(name=lambda number: f"door {number}", before=(), after=(), whole=None):
    """Numbered doors that delete some keys before and after the door opens."""
    keys = {
        "count": lambda number: "arrived",
        "door": lambda number: name(number),
        "door before": lambda number: name(number - 1),
    }

    def barrier(store, rank, world_size, number):
        if store.add("arrived", 1) == (whole or world_size):
            for key in before:
                store.delete_key(keys[key](number))
            store.set(name(number), "")
            for key in after:
                store.delete_key(keys[key](number))
        else:
            store.wait([name(number)], SECOND)

    return barrier


def polls(store, rank, world_size, number):
    if store.add("arrived", 1) == world_size:
        store.delete_key("arrived")
        store.set(f"door {number}", "")
    while not store.check([f"door {number}"]):
        pass


def deletes_in_the_end(store, rank, world_size, number):
    if store.add("arrived", 1) < world_size:
        store.wait([f"door {number}"], SECOND)
        return
    store.delete_key("arrived")
    for old in range(number) if number == 2 else []:
        store.delete_key(f"door {old}")
    store.set(f"door {number}", "")


def test_numbered_doors(capsys):
    barriers.numbered_doors(solved("numbered_doors")[0])
    barriers.numbered_doors(doors(before=["count"], after=["door before"]))
    assert capsys.readouterr().out.count("none breaks it; at most 1 key is left") == 2


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (doors(lambda _: "door", before=["count"]), "Nobody returns from a collective call before"),
        (doors(before=["count"]), "at most one key"),
        (doors(before=["door before"]), "this breaks it"),
        (doors(after=["count", "door before"]), "this breaks it"),
        (doors(before=["count", "door before"], after=["door"]), "this breaks it"),
        (doors(before=["count", "door before"], whole=2), "this breaks it"),
        (lambda *_: None, "Nobody returns"),
        (polls, "again and again"),
        (deletes_in_the_end, "at most one key"),
    ],
    ids=[
        "one door",
        "doors stay",
        "count stays",
        "too late",
        "its own door",
        "for two",
        "nothing",
        "polls",
        "end",
    ],
)
def test_wrong_doors(answer, match):
    refused(barriers.numbered_doors, answer, match=match)


# 5.3 and 5.4


def raises_when_time_is_up(store, rank, world_size, number):
    if store.add(f"arrived {number}", 1) == world_size:
        store.set(f"outcome {number}", "complete")
    store.wait([f"outcome {number}"], SECOND)


def looks_then_sets(store, rank, world_size, number):
    outcome, proposal = f"outcome {number}", "complete"
    if store.add(f"arrived {number}", 1) < world_size:
        try:
            store.wait([outcome], SECOND)
        except DistStoreError:
            proposal = "broken"
    if not store.check([outcome]):
        store.set(outcome, proposal)
    if store.get(outcome) != b"complete":
        raise RuntimeError


def always_broken(store, rank, world_size, number):
    raise RuntimeError


def forgets_the_latecomer(store, rank, world_size, number):
    outcome = f"outcome {number}"
    if store.add(f"arrived {number}", 1) == world_size:
        store.set(outcome, "complete")
        return
    try:
        store.wait([outcome], SECOND)
    except DistStoreError:
        if store.compare_set(outcome, "", "broken") != b"complete":
            raise


def asks_again_and_again(store, rank, world_size, number):
    solved("decided")[0](store, rank, world_size, number)
    store.get(f"outcome {number}")


def reads_the_outcome(store, rank, world_size, number):
    """Right, and unlike the solution."""
    outcome, seen = f"outcome {number}", b""
    if store.add(f"arrived {number}", 1) == world_size:
        seen = store.compare_set(outcome, "", "all are here")
    else:
        try:
            store.wait([outcome], SECOND)
        except DistStoreError:
            seen = store.compare_set(outcome, "", "one gave up")
        else:
            seen = store.compare_set(outcome, "-", "-")
    if seen != b"all are here":
        raise TimeoutError("one gave up")


def test_decisions(capsys):
    barriers.decided(solved("decided")[0])
    barriers.decided(reads_the_outcome)
    assert capsys.readouterr().out.count("at most 3 requests a rank") == 2


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (raises_when_time_is_up, "either all complete it or none"),
        (looks_then_sets, "either all complete it or none"),
        (always_broken, "is completed if no rank dies"),
        (forgets_the_latecomer, "either all complete it or none"),
        (asks_again_and_again, "a rank made 4 requests, at most 3"),
        (lambda *_: None, "Nobody returns"),
    ],
    ids=["no decision", "look, then set", "always broken", "latecomer", "too many", "nothing"],
)
def test_wrong_decisions(answer, match):
    refused(barriers.decided, answer, match=match)


def waits_for(count):
    def depart(store, rank, world_size, number):
        left = store.add(f"left {number}", 1)
        if left == count(world_size):
            store.set(f"all left {number}", "")
        if rank == 0 and left < world_size:
            with suppress(DistStoreError):
                store.wait([f"all left {number}"], SECOND)

    return depart


def waits_for_itself(store, rank, world_size, number):
    if store.add(f"left {number}", 1) == world_size:
        store.set(f"all left {number}", "")
    if rank == 0:
        store.wait([f"all left {number}"], SECOND)


def rank_0_alone_is_counted_out(store, rank, world_size, number):
    if rank == 0:
        with suppress(DistStoreError):
            store.wait([f"left {number}"], SECOND)
    else:
        store.add(f"left {number}", 1)


def all_wait(store, rank, world_size, number):
    if store.add(f"left {number}", 1) == world_size:
        store.set(f"all left {number}", "")
    with suppress(DistStoreError):
        store.wait([f"all left {number}"], SECOND)


def others_are_counted(store, rank, world_size, number):
    """Right, and unlike the solution: rank 0 does not count itself."""
    if rank > 0:
        if store.add(f"left {number}", 1) == world_size - 1:
            store.set(f"all left {number}", "")
    elif world_size > 1:
        with suppress(DistStoreError):
            store.wait([f"all left {number}"], SECOND)


def test_departures(capsys):
    decided, depart = solved("decided", "depart")
    barriers.depart(decided, depart)
    barriers.depart(decided, others_are_counted)
    assert capsys.readouterr().out.count("at most 2 requests a rank to depart") == 2


def rank_0_sleeps(store, rank, world_size, number):
    if rank == 0:
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (rank_0_sleeps, "does not sleep"),
        (lambda *_: None, "rank 0 returns from a collective call last"),
        (waits_for(lambda n: n - 1), "rank 0 returns"),
        (waits_for_itself, "either all complete it or none"),
        (rank_0_alone_is_counted_out, "rank 0 returns|left asleep"),
        (all_wait, "at most 2 wanted|wait for at most a second"),
    ],
    ids=["a sleep", "nothing", "one too few", "raises", "the first to leave", "all wait"],
)
def test_wrong_departures(answer, match):
    decided, _ = solved("decided", "depart")
    refused(barriers.depart, decided, answer, match=match)


# 5.5


def keeper(forget):
    """MyBarrier with another rule for the keys that are deleted."""
    decided, depart = solved("decided", "depart")

    class Barrier:
        def __init__(self, store, rank, world_size):
            self.place, self.number, self.old = (store, rank, world_size), 0, []

        def wait(self):
            store, rank, number = self.place[0], self.place[1], self.number
            self.number += 1
            keys = [f"{name} {number}" for name in ("arrived", "outcome", "left", "all left")]
            try:
                decided(*self.place, number)
            except RuntimeError:
                forget(self, store, rank, keys, complete=False)
                raise
            forget(self, store, rank, keys, complete=True)
            depart(*self.place, number)

    return Barrier


def nothing(self, store, rank, keys, complete):
    pass


def the_one_before(self, store, rank, keys, complete):
    if rank == 0 and complete:
        for key in self.old:
            store.delete_key(key)
    self.old = keys


def also_when_broken(self, store, rank, keys, complete):
    if rank == 0:
        for key in self.old:
            store.delete_key(key)
    self.old = keys


def its_own(self, store, rank, keys, complete):
    if rank == 0:
        store.delete_key(keys[1])


def every_rank(self, store, rank, keys, complete):
    if complete:
        for key in self.old:
            store.delete_key(key)
        self.old = []
    self.old = [*self.old, *keys]


def the_last_rank(self, store, rank, keys, complete):
    """Right, and unlike the solution: another rank deletes."""
    if complete:
        for key in self.old if rank == self.place[2] - 1 else []:
            store.delete_key(key)
        self.old = []
    self.old = [*self.old, *keys]


def test_barriers(capsys):
    names = ("decided", "depart", "MyBarrier")
    barriers.my_barrier(solved(*names)[2])
    barriers.my_barrier(keeper(the_last_rank))
    assert capsys.readouterr().out.count("in 41 steps") == 2


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (nothing, "at most four keys"),
        (the_one_before, "at most four keys"),
        (also_when_broken, "this breaks it"),
        (its_own, "this breaks it"),
        (every_rank, "steps, at most 45"),
    ],
    ids=["none", "one before", "when broken", "its own", "every rank"],
)
def test_wrong_barriers(answer, match):
    refused(barriers.my_barrier, keeper(answer), match=match)
