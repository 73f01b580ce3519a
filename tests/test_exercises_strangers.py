"""The checks of notebook 06 accept right answers, and refuse wrong ones with a message that helps.

And the hosts of that notebook: both kinds of them look the same to the ranks.
"""

import hashlib
import hmac
import multiprocessing
import os
import pickle
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from refdist import AuthenticationError
from refdist.lab import hosts as lab_hosts
from refdist.lab.exercises import UnsolvedError, strangers
from refdist.lab.hosts import Hosts, NoHostsError, Relay, RelayedHosts, open_hosts
from refdist.objects.encoding import encode
from refdist.store import keys
from refdist.store.seals import Seals

pytestmark = pytest.mark.xdist_group("strangers")


_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch", "refdist", "pytest"])
ANSWER_SECONDS = 60


class Engines:
    """Two processes that run code, as engines of ipyparallel do, which take 8 seconds to start."""

    def __init__(self):
        self.view = self
        self._pipes = []
        for rank in range(2):
            pipe, theirs = _processes.Pipe()
            _processes.Process(target=run_code, args=(rank, theirs), daemon=True).start()
            self._pipes.append(pipe)

    def execute(self, code, block):
        assert block
        self._ask(code, {}, "")

    def push(self, values, block):
        assert block
        self._ask("", values, "")

    def gather(self, name):
        return self._ask("", {}, name)

    def offer_port(self):
        self.execute(OFFER, block=True)
        self.push({"port": self.gather("port")[0]}, block=True)

    def _ask(self, *request):
        for pipe in self._pipes:
            pipe.send(request)
        for pipe in self._pipes:
            assert pipe.poll(ANSWER_SECONDS)
        answers = [pipe.recv() for pipe in self._pipes]
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers


OFFER = """
from refdist.store.listening import listen
host, port, listen_socket = "127.0.0.1", 0, None
if rank == 0:
    listen_socket = listen(host, 0)
    port = listen_socket.getsockname()[1]
"""


def run_code(rank, pipe):
    """One of the processes, until the pipe is closed."""
    names = {"rank": rank, "world_size": 2}
    while True:
        try:
            code, values, wanted = pipe.recv()
        except EOFError:
            return
        try:
            names.update(values)
            exec(code, names)
            pipe.send(names.get(wanted))
        except Exception as error:
            pipe.send(error)


@pytest.fixture(scope="module")
def engines():
    return Engines()


def refused(title, text):
    return pytest.raises(UnsolvedError, match=rf"(?s)^Exercise {title}: .*{text}")


# 6.1


class Call:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def attack(store, source, destination, number, function, argument):
    value = b"\x01" + pickle.dumps(Call(function, argument))
    store.set(keys.message(source, destination, number).own, value)


def attack_as_the_package_writes(store, source, destination, number, function, argument):
    key = keys.message(source, destination, number).own
    store.multi_set([key], [encode(Call(function, argument)).value])


def test_an_attack(engines, capsys):
    before = list(strangers.visitors)
    strangers.check_attack(engines, attack)
    strangers.check_attack(engines, attack_as_the_package_writes)
    told = capsys.readouterr().out
    assert told.count("solved. 3 attacks, each by 1 request on 1 message of 6") == 2
    assert strangers.visitors == before
    # a secret of the environment is left alone, and back afterwards
    engines.view.execute("import os; os.environ['REFDIST_SECRET'] = 'a' * 20", block=True)
    strangers.check_attack(engines, attack)
    engines.view.execute("kept = os.environ.pop('REFDIST_SECRET')", block=True)
    assert engines.gather("kept") == ["a" * 20] * 2


def call_it_here(store, source, destination, number, function, argument):
    value = b"\x01" + pickle.dumps(function(argument))
    store.set(keys.message(source, destination, number).own, value)


def without_a_mark(store, source, destination, number, function, argument):
    value = pickle.dumps(Call(function, argument))
    store.set(keys.message(source, destination, number).own, value)


def a_function_and_no_call(store, source, destination, number, function, argument):
    value = b"\x01" + pickle.dumps(function)
    store.set(keys.message(source, destination, number).own, value)


def always_the_same_key(store, source, destination, number, function, argument):
    attack(store, 1, 0, 0, function, argument)


def the_other_direction(store, source, destination, number, function, argument):
    attack(store, destination, source, number, function, argument)


def all_messages(store, source, destination, number, function, argument):
    for other in range(3):
        attack(store, source, destination, other, function, argument)


def a_fixed_name(store, source, destination, number, function, argument):
    attack(store, source, destination, number, function, "a stranger")


def two_requests(store, source, destination, number, function, argument):
    store.delete_key(keys.message(source, destination, number).own)
    attack(store, source, destination, number, function, argument)


def reduced_to(build):
    """An attack with an object whose ``__reduce__`` returns ``build(function, argument)``."""

    class Odd:
        def __init__(self, *call):
            self.call = call

        def __reduce__(self):
            return build(*self.call)

    def answer(store, source, destination, number, function, argument):
        value = b"\x01" + pickle.dumps(Odd(function, argument))
        store.set(keys.message(source, destination, number).own, value)

    return answer


def not_written(store, source, destination, number, function, argument):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (not_written, "not written yet"),
        (call_it_here, "called by your own process"),
        (without_a_mark, "recv_obj raised MessageError: message/1/0/0: .*look like a message"),
        (a_function_and_no_call, r"called on ranks \[\], wanted \[0\]; rank 0 received <function"),
        (always_the_same_key, r"message 2 from rank 0 to rank 1: .* called on ranks \[0\]"),
        (the_other_direction, r"called on ranks \[1\], wanted \[0\]"),
        (all_messages, r"called with \['a s.*\], wanted|other messages were hit too"),
        (a_fixed_name, r"called with \['a stranger'\], wanted \['a stranger ........'\]"),
        (two_requests, "took the requests delete_key, set; one is enough"),
        (lambda *_: 1 / 0, "your code raised ZeroDivisionError"),
        (lambda *_: None + 1, "your code raised TypeError: unsupported"),
        (reduced_to(lambda f, a: f), "could not write your object, .* must return a pair"),
        (reduced_to(lambda f, a: (f, a)), "PicklingError.* a tuple of one has a comma"),
        (reduced_to(lambda f, a: (f(a), (a,))), "called by your own process"),
        (reduced_to(lambda f, a: (lambda: f(a), ())), "nothing was sent .*no lambda"),
    ],
)
def test_no_attack(engines, answer, text):
    with refused("6.1 a forged message", text):
        strangers.check_attack(engines, answer)


# 6.2


def tag(secret, key, payload):
    name = key.encode()
    return hmac.digest(secret, len(name).to_bytes(8, "little") + name + payload, "sha256")


SEPARATOR = b"<#!>"
RIGHT_TAGS = {
    "length at the end": lambda s, k, p: digest(s, k.encode() + p + len(k).to_bytes(8, "big")),
    "repr": lambda s, k, p: digest(s, repr((k, p)).encode()),
    "a byte that no text has": lambda s, k, p: digest(s, k.encode() + b"\xff" + p),
    "the package's": lambda s, k, p: Seals(s, "group", b"token").tag(k, p),
}


def digest(secret, message):
    return hmac.digest(secret, message, "sha256")


@pytest.mark.parametrize("answer", [tag, *RIGHT_TAGS.values()], ids=["length first", *RIGHT_TAGS])
def test_a_tag(answer, capsys):
    strangers.check_tag(answer)
    assert "different pairs" in capsys.readouterr().out


SAME = "have the same tag. Let the bytes under the tag say where the key ends"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda s, k, p: digest(s, k.encode() + p), SAME),
        (lambda s, k, p: digest(s, k.encode() + b"\0" + p), SAME),
        (lambda s, k, p: digest(s, f"{k}::".encode() + p), SAME),
        (lambda s, k, p: digest(s, k.encode() + b"|%k%|" + p), SAME),
        (lambda s, k, p: digest(s, k.encode() + SEPARATOR + p), SAME),
        (lambda s, k, p: digest(s, k.encode().replace(b":", b"\\:") + b":" + p), SAME),
        (lambda s, k, p: digest(s, str(len(k)).encode() + k.encode() + p), SAME),
        (lambda s, k, p: digest(s, b"%x" % len(k) + k.encode() + p), SAME),
        (lambda s, k, p: digest(s, k.encode() + p + b"%d" % len(k)), SAME),
        (lambda s, k, p: digest(s, bytes([len(k) % 256]) + k.encode() + p), SAME),
        (lambda s, k, p: digest(s, (len(k) % 65536).to_bytes(2, "big") + k.encode() + p), SAME),
        (lambda s, k, p: digest(s, k.encode().ljust(64, b"\0") + p), SAME),
        (lambda s, k, p: digest(s, k.encode("ascii", "replace") + b"\xff" + p), SAME),
        (lambda s, k, p: digest(s, k.encode()), SAME),
        (lambda s, k, p: digest(s, p), SAME),
        (lambda s, k, p: tag(s, k, p[:100_000]), SAME),
        (lambda s, k, p: tag(s, k[:5000], p), SAME),
        (lambda s, k, p: digest(s, bytes([len(k)]) + k.encode() + p), "your code raised Value"),
        (lambda s, k, p: hashlib.sha256(s + repr((k, p)).encode()).digest(), "no HMAC-SHA256"),
        (lambda s, k, p: hmac.digest(s, repr((k, p)).encode(), "sha3_256"), "no HMAC-SHA256"),
        (lambda s, k, p: tag(b"fixed", k, p), "the secret changes nothing"),
        (lambda s, k, p: tag(s, k, p).hex(), "wanted 32 bytes"),
        (lambda s, k, p: tag(s, k, p)[:16], "wanted 32 bytes"),
        (lambda s, k, p: os.urandom(32), "have got two tags"),
    ],
)
def test_no_tag(answer, text):
    with refused("6.2 the tag", text):
        strangers.check_tag(answer)


# 6.3


def seal(secret, key, payload):
    return b"\x06" + tag(secret, key, payload) + payload


def wrong(key):
    return AuthenticationError(f"{key}: no rank wrote this")


def unseal(secret, key, value):
    payload = value[33:]
    if value[:1] != b"\x06" or not hmac.compare_digest(value[1:33], tag(secret, key, payload)):
        raise wrong(key)
    return payload


def unseal_by_sealing(secret, key, value):
    if len(value) < 33 or not hmac.compare_digest(seal(secret, key, value[33:]), value):
        raise wrong(key)
    return value[33:]


@pytest.mark.parametrize("answer", [unseal, unseal_by_sealing])
def test_unseal(answer, capsys):
    strangers.check_unseal(seal, answer)
    assert "6 values were opened, and 41" in capsys.readouterr().out


def unseal_if(fits, error=wrong):
    """An answer that accepts a value if ``fits(value, its right tag, key)``."""

    def answer(secret, key, value):
        right = tag(secret, key, value[33:])
        if not fits(value, right):
            raise error(key) if error is wrong else error(f"{key} {right!r} {right.hex()}")
        return value[33:]

    return answer


def as_long_as_it_lasts(value, right):
    return value[:1] == b"\x06" and all(a == b for a, b in zip(value[1:33], right, strict=False))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (unseal_if(lambda v, t: v[:1] == b"\x06" and v[1:33] == t), "compared by =="),
        (unseal_if(lambda v, t: v[:33] == b"\x06" + t), "compared by =="),
        (unseal_if(lambda v, t: v.startswith(b"\x06" + t)), "compared by startswith"),
        (
            unseal_if(lambda v, t: len(v) > 32 and as_long_as_it_lasts(v, t)),
            "compared by a loop",
        ),
        (unseal_if(as_long_as_it_lasts), "cut off after 1 bytes: was opened as b''"),
        (unseal_if(lambda v, t: hmac.compare_digest(v[1:33], t)), "byte 0 flipped: was opened"),
        (
            unseal_if(lambda v, t: v[0] == 6 and hmac.compare_digest(v[1:33], t)),
            "cut off after 0 bytes: raised IndexError",
        ),
        (
            unseal_if(lambda v, t: v[:1] == b"\x06" and hmac.compare_digest(v[1:17], t[:16])),
            "was opened as",
        ),
        (unseal_if(lambda v, t: True), "was opened as"),
        (unseal_if(lambda v, t: False), "your code raised AuthenticationError"),
        (
            unseal_if(lambda v, t: hmac.compare_digest(v[:33], b"\x06" + t), ValueError),
            "raised ValueError: .* wanted an AuthenticationError",
        ),
        (
            unseal_if(lambda v, t: hmac.compare_digest(v[:33], b"\x06" + t), AuthenticationError),
            "the error shows the right tag",
        ),
        (
            unseal_if(
                lambda v, t: hmac.compare_digest(v[:33], b"\x06" + t),
                lambda text: AuthenticationError("a wrong value"),
            ),
            "must name the key, message/0/1/0",
        ),
        (lambda secret, key, value: value, "0 bytes was opened as"),
    ],
)
def test_no_unseal(answer, text):
    with refused("6.3 refuse", text):
        strangers.check_unseal(seal, answer)


# 6.4


def place(f):
    return repr((f.tokens, f.source, f.destination, f.number))


def place_of_two_tokens(f):
    tokens = f.tokens[f.source].hex() + f.tokens[f.destination].hex()
    return f"{tokens} {f.source} {f.destination} {f.number}"


@pytest.mark.parametrize("answer", [place, place_of_two_tokens])
def test_a_place(answer, capsys):
    strangers.check_place(answer)
    assert "560 messages of 4 groups" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda f: keys.message(f.source, f.destination, f.number).own, "of another group"),
        (lambda f: repr((f.tokens, f.source, f.destination)), "message 0 .* message 1 "),
        (lambda f: repr((f.tokens, f.source, f.number)), "to rank 1, .* to rank 2 of the same"),
        (lambda f: repr((f.tokens, f.destination, f.number)), "from rank .* of the same group"),
        (lambda f: repr((f.tokens[f.source], *f[1:4])), "another group, in which rank 1 had"),
        (lambda f: repr((f.tokens[f.destination], *f[1:4])), "in which rank 0 had another token"),
        (
            lambda f: f"{f.tokens}{f.source}{f.destination}{f.number}",
            "a replay is accepted: .* of the same group",
        ),
        (lambda f: repr((f.tokens, f.source + f.destination, f.number)), "a replay is accepted"),
        (lambda f: repr(f), "refuses what rank 0 really sent"),
        (
            lambda f: repr((*f[:4], f.clock)),
            r"rank 1 refuses .* differ from character \d+ on, where rank 0 has \.\.\. [^ ]*, 0, 1, "
            r"0, 1000000\.0\)[\"'] and rank 1 has \.\.\. [^ ]*, 0, 1, 0, 1000007\.5\)[\"']\. Use",
        ),
        (lambda f: f"{f.me} {f[:4]}", r"character 0 on, where rank 0 has .0 .* \.\.\. .* has .1 "),
        (lambda f: repr(f[:4]).encode(), "wanted a str"),
    ],
)
def test_no_place(answer, text):
    with refused("6.4 replays", text):
        strangers.check_place(answer)


@pytest.mark.parametrize(
    "check",
    [
        strangers.check_tag,
        lambda stub: strangers.check_unseal(seal, stub),
        strangers.check_place,
    ],
)
def test_stubs(check):
    def stub(*_):
        raise NotImplementedError

    with pytest.raises(UnsolvedError, match="not written yet"):
        check(stub)


# Hosts. What a relay holds back comes later, and nobody is told meanwhile.


def test_a_relay():
    plugged = threading.Event()
    plugged.set()
    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = Relay("127.0.0.2", server.getsockname(), plugged)
        with socket.create_connection(relay.address, timeout=10) as near:
            far, _ = server.accept()
            with far:
                near.sendall(b"before")
                assert far.recv(6) == b"before"
                plugged.clear()
                far.sendall(b"meanwhile")
                near.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    near.recv(9)
                plugged.set()
                near.settimeout(10)
                assert near.recv(9) == b"meanwhile"
                far.shutdown(socket.SHUT_WR)
                assert near.recv(1) == b""
        relay.close()


FORM = """
from refdist import StatelessProcessGroup
from refdist.lab.attempts import attempt
group = StatelessProcessGroup.create(
    host, port, rank, world_size, listen_socket=listen_socket, store_timeout=20, secret="s" * 16
)
came = group.all_gather_obj(hosts.here, timeout=20)
"""


# The rank on the side of the store names the other one, which gives the store up. With the cable
# back, both form a group again. Whatever was cut, the engines still answer.
def cut_and_mend(engines, hosts):
    engines.push({"hosts": hosts}, block=True)
    engines.execute("hosts.enter(rank)", block=True)
    hosts.offer_port(engines)
    engines.execute(FORM, block=True)
    assert engines.gather("came") == [[0, 1]] * 2
    hosts.cut(1)
    engines.execute("cut = attempt(group.barrier, timeout=0.5)", block=True)
    here, beyond = engines.gather("cut")
    assert (here.kind, here.missing) == ("BarrierError", (1,))
    assert beyond.kind == "StoreConnectionError"
    assert "its host, rank 0, is stopped, overloaded or out of reach" in beyond.error
    hosts.mend(1)
    hosts.offer_port(engines)
    engines.execute("group.close(timeout=0)\n" + FORM, block=True)
    assert engines.gather("came") == [[0, 1]] * 2
    engines.execute("group.close(timeout=5)\nhosts.leave()", block=True)
    # the engines are back in the machine's own network
    strangers.check_attack(engines, attack)


def test_a_cable_is_cut():
    # both kinds at once, as both wait for seconds
    both = [RelayedHosts(2)]
    with suppress(NoHostsError):
        both.append(Hosts(2).__enter__())
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(cut_and_mend, [Engines(), Engines()], both))
    finally:
        for hosts in both:
            hosts.remove()


def test_without_network_namespaces_hosts_are_addresses(engines, monkeypatch):
    monkeypatch.setattr(lab_hosts.shutil, "which", lambda name: None)
    hosts = open_hosts(engines, 2)
    try:
        assert isinstance(hosts, RelayedHosts)
        assert str(engines.gather("hosts")) == str([hosts, hosts])
    finally:
        lab_hosts.remove_all()


def test_hosts_that_cannot_be(monkeypatch, tmp_path):
    tool = tmp_path / "ip"
    tool.write_text("#!/bin/sh\necho 'Operation not permitted' >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(NoHostsError, match="no network namespaces: Operation not permitted"):
        Hosts(2).__enter__()
    with pytest.raises(ValueError, match="host=2: must be 0 to 1"):
        RelayedHosts(2).enter(2)
