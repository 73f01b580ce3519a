"""One group is for one thread at a time."""

import threading

import pytest
import torch
from ranks import LOCAL, Watched
from torch.distributed import HashStore

from refdist import StatelessProcessGroup, create_tcp_store
from refdist.errors import ConcurrentCallError

SLACK = 6.0

# A thread waits for a message. Meanwhile, another thread of the process is refused each call, which
# changes nothing; the first thread gets its message.

CALLS = {
    "barrier": lambda group: group.barrier(),
    "send_obj": lambda group: group.send_obj("refused", 0),
    "recv_obj": lambda group: group.recv_obj(0),
    "broadcast_obj": lambda group: group.broadcast_obj(None, 0),
    "all_gather_obj": lambda group: group.all_gather_obj("refused"),
    "expire_data": lambda group: group.expire_data(),
    "send": lambda group: group.send(torch.ones(1), 0),
    "recv": lambda group: group.recv(torch.ones(1), 0),
    "all_reduce": lambda group: group.all_reduce(torch.ones(1)),
}
AS = {"send": "send_obj", "recv": "recv_obj", "all_reduce": "all_gather_obj"}


@pytest.mark.parametrize("kind", ["tcp", "hash"])
def test_a_second_thread_is_refused(kind):
    if kind == "hash":
        stores = [HashStore()] * 2
    else:
        server = create_tcp_store(LOCAL, 0, is_master=True)
        stores = [server, create_tcp_store(LOCAL, server.port)]
    waits = threading.Event()

    def before(request, *arguments):
        if request == "wait":
            waits.set()

    sender = StatelessProcessGroup(0, 2, stores[0])
    group = StatelessProcessGroup(1, 2, Watched(stores[1], before))
    received = []
    first = threading.Thread(target=lambda: received.append(group.recv_obj(0)), daemon=True)
    first.start()
    assert waits.wait(SLACK)
    keys = stores[0].num_keys()
    for name, call in CALLS.items():
        text = rf"^{AS.get(name, name)}: recv_obj is running in thread {first.ident}; a group is"
        with pytest.raises(ConcurrentCallError, match=text):
            call(group)
    assert stores[0].num_keys() == keys
    assert not group.entries and group.send_dst_counter == {0: 0, 1: 0}
    sender.send_obj("message", 1)
    sender.send_obj("another", 1)
    first.join(2 * SLACK)
    assert received == ["message"]
    # one after the other, threads may use it
    second = threading.Thread(target=lambda: received.append(group.recv_obj(0)), daemon=True)
    second.start()
    second.join(2 * SLACK)
    assert received == ["message", "another"]
