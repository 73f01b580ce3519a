"""A minute with the nemesis: see there. ``make nemesis`` is for longer."""

import nemesis
import pytest


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
