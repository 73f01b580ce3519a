"""The observer counts the keys of a real store, from outside."""

import time

from ranks import LOCAL

from refdist import create_tcp_store
from refdist.lab.observer import KeyObserver

DEADLINE = 20.0


def wait_for_count(observer, keys):
    until = time.monotonic() + DEADLINE
    while not (observer.counts and observer.counts[-1].keys == keys):
        assert time.monotonic() < until
        time.sleep(0.001)


def test_it_sees_keys_come_and_go():
    store = create_tcp_store(LOCAL, 0, is_master=True)
    start = time.monotonic()
    with KeyObserver(LOCAL, store.port) as observer:
        wait_for_count(observer, 0)
        for key in "abc":
            store.set(key, "")
        wait_for_count(observer, 3)
        store.delete_key("a")
        wait_for_count(observer, 2)
        store.set("d", "")
    # the last count is of the end
    assert observer.counts[-1].keys == 3
    times = [count.at for count in observer.counts]
    assert times == sorted(times) and start < times[0] and times[-1] < time.monotonic()
    seen = len(observer.counts)
    store.set("e", "")
    assert len(observer.counts) == seen


def test_it_ends_with_the_store():
    store = create_tcp_store(LOCAL, 0, is_master=True)
    with KeyObserver(LOCAL, store.port) as observer:
        wait_for_count(observer, 0)
        del store
