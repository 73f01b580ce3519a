"""A minute with the nemesis: see there. ``make nemesis`` is for longer."""

import nemesis
import pytest
import regrouping_nemesis


@pytest.mark.timeout(240)
def test_a_minute_with_the_nemesis():
    done, violations = nemesis.run_for(60, run_seconds=15.0)
    assert violations == []
    # a rank that is killed early leaves the others little to call, so a run may have few calls
    assert done["runs"] >= 3 and done["calls"] > 0 and done["SIGINT"] > 100, done


# The check itself: logs of what must not happen are found out.


def events(*tails):
    return [[float(at), *tail] for at, tail in enumerate(tails)]


ENTERED = [[0, "enter", 0, 1, "gather"], [1, "enter", 0, 1, "gather"]]
LEFT = [0, "leave", 0, 1, "gather", "returned", [[0, 1, 0], [0, 1, 1]]]


@pytest.mark.parametrize(
    ("happened", "found"),
    [
        ([*ENTERED, LEFT], None),
        ([ENTERED[0], LEFT, ENTERED[1]], "early"),
        ([*ENTERED, LEFT, [1, "leave", 0, 1, "gather", "raised", "why"]], "split"),
        ([*ENTERED, [*LEFT[:-1], [[0, 1, 0], [0, 2, 1]]]], "mixed"),
        (
            [[0, "recv", 0, 1, [0, 1, 0], "returned"], [0, "recv", 0, 1, [0, 1, 1], "returned"]],
            None,
        ),
        ([[0, "recv", 0, 1, [0, 1, 1], "returned"]], "lost"),
        ([[0, "recv", 0, 1, [0, 1, 0], "returned"]] * 2, "lost"),
    ],
)
def test_the_check_finds_what_is_wrong(happened, found):
    wrong = nemesis.check(events(*happened), 2)
    assert [line.partition(":")[0] for line in wrong] == ([found] if found else [])


# Groups that shrink and grow.


@pytest.mark.timeout(120)
def test_some_seconds_with_the_nemesis_of_groups():
    done, violations = regrouping_nemesis.run_for(16, seed=2, run_seconds=8.0)
    assert violations == []
    assert done["runs"] == 2 and done["calls"] > 0 and done["SIGKILL"] > 0, done


A, B = ["store", ""], ["store", "era/1/shrunk/"]


def in_group(identity, members, followed=None):
    how = "created" if followed is None else "shrunk"
    size = len(members)
    return [
        [me, "group", identity, followed, how, rank, size] for rank, me in enumerate(members) if me
    ]


def gathered(me, identity, members, generation=1):
    return [me, "gather", identity, generation, "returned", [[identity, 1, one] for one in members]]


def got(number, identity=A):
    return [[0, 1], "recv", A, 1, [identity, 1, number], "returned"]


THREE = [0, 1], [1, 1], [2, 1]


@pytest.mark.parametrize(
    ("happened", "found"),
    [
        ([*in_group(A, THREE), *in_group(B, THREE[1:], A)], []),
        ([*in_group(A, THREE), *in_group(A, [THREE[1]])], ["double", "double"]),
        ([*in_group(A, THREE), *in_group(A, [None, None, None, THREE[0]])], ["double", "double"]),
        ([*in_group(B, THREE[1:], A), *in_group(["store", "era/1/x"], THREE[:1], A)], ["forked"]),
        ([*in_group(B, THREE[1:], A), *in_group(["other", "era/1/x"], THREE[:1], A)], []),
        ([*in_group(A, THREE), gathered(THREE[0], A, THREE)], []),
        ([*in_group(A, THREE), gathered(THREE[0], A, THREE[::-1])], ["lost"]),
        ([*in_group(A, THREE), gathered(THREE[0], A, THREE[:2])], ["lost"]),
        ([*in_group(A, THREE), gathered(THREE[0], A, THREE, 2)], ["mixed"]),
        ([got(0), got(1)], []),
        ([got(0), got(0)], ["message"]),
        ([got(1)], ["message"]),
        ([got(0, B)], ["message"]),
        ([[[0, 1], "failed", "why"]], ["failed"]),
    ],
)
def test_the_check_of_groups_finds_what_is_wrong(happened, found):
    wrong = regrouping_nemesis.check(events(*happened))
    assert [line.partition(":")[0] for line in wrong] == found
