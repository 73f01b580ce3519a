"""A stranger writes into the store of a live group. ``make fuzz`` does the same for longer."""

import pytest
from ranks import LOCAL, run_ranks
from strangers import aim, storm

from refdist import create_tcp_store

# Each runs several processes, and all of them are busy.
pytestmark = pytest.mark.xdist_group("fuzzing")

each_group = pytest.mark.parametrize("secret", [True, False], ids=["secret", "none"])


@pytest.fixture(params=[True, False], ids=["libuv", "legacy"])
def libuv(request):
    try:
        create_tcp_store(LOCAL, 0, is_master=True, use_libuv=request.param)
    except NotImplementedError:
        pytest.skip("this torch cannot serve on a bound socket with libuv")
    return request.param


# Inputs where a rank is about to read: each is refused where there is a secret, or gives an object
# or an error of refdist where there is none; the group works afterwards.
@each_group
def test_inputs_that_are_read(secret, libuv, tmp_path):
    (counts,) = run_ranks(aim, 1, 1000, "1", secret, libuv, str(tmp_path), deadline=90)
    assert counts["inputs"] == 1000


# Inputs anywhere, while three ranks work: every call ends in time, and a group works afterwards.
@each_group
def test_inputs_that_come_meanwhile(secret, libuv, tmp_path):
    *_, counts = run_ranks(storm, 4, 200, "1", secret, libuv, str(tmp_path), deadline=90)
    assert counts["inputs"] == 200
