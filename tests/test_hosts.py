"""Groups of three hosts: their addresses, a cable that is pulled, a port that is closed."""

import time
from datetime import timedelta

import pytest
from hosts import HostsUnderTest, know_names
from ranks import Rank, Watched, run_ranks, until

from refdist import (
    BarrierError,
    GroupCreationError,
    MessageTimeoutError,
    StatelessProcessGroup,
    StoreConnectionError,
)
from refdist.barrier.roll import Try
from refdist.deadline import Deadline
from refdist.lab.hosts import NoHostsError

PORT = 29600  # these hosts have nobody else
SLACK = 8.0  # seconds that a loaded machine may take, above what a protocol allows

# all of them build hosts, and the names of hosts are those of the process
pytestmark = pytest.mark.xdist_group("hosts")


@pytest.fixture
def hosts():
    try:
        with HostsUnderTest(3) as built:
            yield built
    except NoHostsError as error:
        pytest.skip(str(error))


def form(here: Rank, address: str, store_timeout: float = 20) -> StatelessProcessGroup:
    """A group of all hosts, whose store is on host 0."""
    return StatelessProcessGroup.create(
        address, PORT, here.rank, here.world_size, store_timeout=store_timeout
    )


def check(group: StatelessProcessGroup) -> None:
    """Everything that a group does, and its end."""
    large = bytes(20 << 20)  # three chunks
    with group:
        assert group.all_gather_obj(group.rank) == list(range(group.world_size))
        group.barrier(timeout=20)
        if group.rank == 2:
            group.send_obj(large, dst=1)
        if group.rank == 1:
            assert group.recv_obj(src=2, timeout=20) == large


def form_again(here: Rank, hosts: HostsUnderTest, old: StatelessProcessGroup, cut: int) -> None:
    """The cable is back, so a new group of the same ranks works at the same place."""
    here.meet("all have seen it")
    if here.rank == 1:
        hosts.mend(cut)
    old.close(timeout=0)
    here.meet("mended")
    check(form(here, hosts.ipv4(0)))


class Timed:
    """Asserts that its body takes at least ``least`` seconds, and not much more than ``most``."""

    def __init__(self, least: float, most: float) -> None:
        self._least, self._most = least, most

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            elapsed = time.monotonic() - self._start
            assert self._least - 0.01 <= elapsed < self._most + SLACK, elapsed


# Every kind of address forms a group.


def meet_on(here, hosts, address):
    hosts.enter(here.rank)
    group = form(here, address)
    assert group.host.partition("%")[0] == address.partition("%")[0]
    check(group)


@pytest.mark.parametrize("kind", ["IPv4", "IPv6", "IPv6 of the link"])
def test_group(hosts, kind):
    address = {"IPv4": hosts.ipv4(0), "IPv6": hosts.ipv6(0), "IPv6 of the link": "fe80::1%eth0"}
    run_ranks(meet_on, 3, hosts, address[kind])


# A name may have several addresses. Rank 0 knows its own name by a loopback address too, as on
# Debian, and listens where the others can find it. They know an old address too, from which
# nothing comes back.


def meet_by_name(here, hosts, folder):
    hosts.enter(here.rank)
    own = ["127.0.1.1", "10.99.0.77", hosts.ipv4(0)]
    others = [hosts.ipv4(2), "10.99.0.77", hosts.ipv4(0)]
    know_names({"head": own if here.rank == 0 else others}, folder)
    group = form(here, "head")
    assert group.host == hosts.ipv4(0)
    check(group)


def test_a_name_with_several_addresses(hosts, tmp_path):
    run_ranks(meet_by_name, 3, hosts, tmp_path)


# A cable is pulled before its host comes to a barrier. Who is on the side of the store raises in
# time and names the hosts beyond; who is beyond gives the store up. With the cable back, the same
# ranks form a group at the same place.


def cut_off_before_a_barrier(here, hosts, cut):
    hosts.enter(here.rank)
    group = form(here, hosts.ipv4(0))
    here.meet("formed")
    if here.rank == 1:
        hosts.cut(cut)
    here.meet("cut")
    beyond = {2} if cut == 2 else {1, 2}
    with Timed(2, 4):
        if here.rank in beyond:
            with pytest.raises(StoreConnectionError, match=r"barrier: .*its host, rank 0, is .*"):
                group.barrier(timeout=2)
        else:
            with pytest.raises(BarrierError, match=r"missing|in vain") as raised:
                group.barrier(timeout=2)
            assert set(raised.value.missing) == beyond
            assert raised.value.phase == "arrival"
    form_again(here, hosts, group, cut)


@pytest.mark.parametrize("cut", [2, 0], ids=["a member", "the store"])
def test_a_cable_is_pulled_before_a_barrier(hosts, cut):
    run_ranks(cut_off_before_a_barrier, 3, hosts, cut)


# A cable is pulled while its host waits in a barrier, and the others come then. All have arrived,
# so the barrier completes: rank 1 returns, and rank 0 misses rank 2, which cannot say that it has
# left. If the cable is back in time, nobody notices but by the clock.


def cut_off_in_a_barrier(here, hosts):
    hosts.enter(here.rank)
    group = form(here, hosts.ipv4(0))
    if here.rank != 2:
        cut_as_rank_2_waits(here, hosts, group)
    with Timed(0, 6):
        if here.rank == 0:
            with pytest.raises(BarrierError, match="in vain for rank 2 to leave") as raised:
                group.barrier(timeout=4)
            assert raised.value.completed and raised.value.missing == (2,)
        elif here.rank == 1:
            group.barrier(timeout=4)
        else:
            with pytest.raises(StoreConnectionError, match=r"barrier: .*its host, rank 0, is"):
                group.barrier(timeout=4)
    form_again(here, hosts, group, 2)


def cut_as_rank_2_waits(here, hosts, group):
    # the first barrier of the group was that of its creation
    barrier = group._barrier
    until(lambda: 2 in barrier.read(Try(barrier.keys, b"", Deadline(0))).values)
    here.tell(f"rank {here.rank} has seen it")
    if here.rank == 1:
        here.ask("rank 0 has seen it")
        hosts.cut(2)
        here.tell("cut")
    here.ask("cut")


def test_a_cable_is_pulled_in_a_barrier(hosts):
    run_ranks(cut_off_in_a_barrier, 3, hosts)


def cut_off_for_a_moment(here, hosts):
    hosts.enter(here.rank)
    group = form(here, hosts.ipv4(0))
    if here.rank != 2:
        cut_as_rank_2_waits(here, hosts, group)
    group.barrier(timeout=20)
    if here.rank == 1:
        hosts.mend(2)
    check(group)


def test_a_cable_is_back_in_time(hosts):
    run_ranks(cut_off_for_a_moment, 3, hosts)


# A cable is pulled while a message of 12 chunks is sent. Its receiver waits in vain for the rest,
# another rank for the message that should come after it, and the sender gives the store up.


def cut_off_in_a_message(here, hosts):
    hosts.enter(here.rank)
    group = form(here, hosts.ipv4(0))
    seen = []

    def before(request, *arguments):
        seen.append(request)
        if sum(name in ("set", "multi_set") for name in seen) == 6:
            hosts.cut(2)
            here.tell("cut")

    if here.rank == 2:
        group._barrier.store._store = Watched(group.store, before)
    group.store.set_timeout(timedelta(seconds=3))
    with Timed(3, 5):
        if here.rank == 2:
            with pytest.raises(StoreConnectionError, match=r"send_obj: .*its host, rank 0, is"):
                group.send_obj(bytes(96 << 20), dst=1)
            assert here.told("cut")
        elif here.rank == 1:
            text = "rank 1 waited in vain for the rest from rank 2"
            with pytest.raises(MessageTimeoutError, match=text) as raised:
                group.recv_obj(src=2)
        else:
            text = "rank 0 waited in vain for this from rank 2"
            with pytest.raises(MessageTimeoutError, match=text) as raised:
                group.recv_obj(src=2)
        if here.rank != 2:
            assert raised.value.missing == (2,)
    form_again(here, hosts, group, 2)


def test_a_cable_is_pulled_in_a_message(hosts):
    run_ranks(cut_off_in_a_message, 3, hosts)


# A firewall of rank 0's host drops what comes to the port, from other hosts or from anyone; or the
# other hosts have no route. Creation fails in time, and says what was tried.


def form_in_vain(here, hosts, address, alone, reason):
    hosts.enter(here.rank)
    with Timed(2, 4):
        if here.rank == 0 and alone:
            text = f"the store on {address}:{PORT}"
            with pytest.raises(StoreConnectionError, match=text) as raised:
                form(here, address, store_timeout=2)
            assert "firewall" in str(raised.value) or "timed out" in str(raised.value)
        elif here.rank == 0:
            text = f"1 of 3 ranks came to {address}:{PORT} within 2 s; missing: ranks 1 and 2"
            with pytest.raises(GroupCreationError, match=text) as raised:
                form(here, address, store_timeout=2)
            assert raised.value.missing == (1, 2)
        else:
            text = (
                rf"no store answered on {address}:{PORT} within 2 s "
                rf"\(tried {address}, \d+ times; last: {reason}"
            )
            with pytest.raises(StoreConnectionError, match=text):
                form(here, address, store_timeout=2)


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
@pytest.mark.parametrize("cards", [["eth0"], ["eth0", "lo"]], ids=["others", "anyone"])
def test_a_firewall_drops_what_comes_to_the_port(hosts, family, cards):
    address = getattr(hosts, family)(0)
    try:
        for card in cards:
            hosts.drop_port(0, PORT, card)
    except NoHostsError as error:
        pytest.skip(str(error))
    reason = "nothing came back, as from a firewall"
    run_ranks(form_in_vain, 3, hosts, address, "lo" in cards, reason)


def test_no_route_leads_to_the_host(hosts):
    for other in (1, 2):
        hosts.prohibit_route(other, hosts.ipv4(0))
    reason = r"\[Errno 13\] Permission denied"
    run_ranks(form_in_vain, 3, hosts, hosts.ipv4(0), False, reason)
