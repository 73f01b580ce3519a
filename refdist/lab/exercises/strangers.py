"""Checks of notebook 06: an attack on a group, tags, values that are refused, and replays."""

import hashlib
import inspect
import itertools
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from torch.distributed import TCPStore

from refdist import AuthenticationError, create_tcp_store
from refdist.lab.attempts import Attempt
from refdist.lab.exercises import exercise, require

TAG_BYTES = 32
MARK = b"\x06"

visitors: list[str] = []
"""The names of those that have called ``visit`` on this process."""


def visit(name: str) -> str:
    """A harmless function in place of a harmful one: note a name. Returns a greeting."""
    visitors.append(name)
    return f"{name} was here"


# 6.1

Attack = Callable[[Any, int, int, int, Callable[[str], str], str], None]

_MEET = """
import os as _os
from refdist import StatelessProcessGroup as _Group
from refdist.lab.attempts import attempt as _attempt
from refdist.lab.exercises import strangers as _strangers
_kept = _os.environ.pop("REFDIST_SECRET", None)
try:
    _attacked = _Group.create(host, port, rank, world_size, listen_socket=listen_socket)
finally:
    if _kept is not None:
        _os.environ["REFDIST_SECRET"] = _kept
for _number in range(3):
    for _other in {0, 1} - {rank}:
        if rank in {0, 1}:
            _attacked.send_obj(("from", rank, _number), _other)
_attacked.barrier()
_before = len(_strangers.visitors)
_came = []
"""

_RECEIVE = """
if rank in {0, 1}:
    _came = [_attempt(_attacked.recv_obj, 1 - rank, timeout=5) for _ in range(3)]
_visits = _strangers.visitors[_before:]
del _strangers.visitors[_before:]
_attacked.barrier()
_attacked.close()
"""


@exercise("6.1 a forged message")
def check_attack(engines: Any, attack: Attack) -> str:
    """On two or more engines: every attack hits, by one request, and spares the other messages."""
    for source, destination, number in [(1, 0, 0), (0, 1, 2), (1, 0, 1)]:
        engines.offer_port()
        engines.view.execute(_MEET, block=True)
        store = _Recording(engines.gather("host")[0], engines.gather("port")[0])
        name, here = f"a stranger {os.urandom(4).hex()}", len(visitors)
        try:
            failed = ""
            try:
                attack(store, source, destination, number, visit, name)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                failed = _why_no_pickle(error)
            done = list(store.requests)
            own, visitors[here:] = visitors[here:], []
            require(
                not own,
                "the function was called by your own process, while you made the value. Let the "
                "pickle name the function, so that its reader calls it",
            )
            require(not failed, failed)
            store.store.num_keys()  # answered, so all before it is done
        finally:
            engines.view.execute(_RECEIVE, block=True)
        where = f"attack on message {number} from rank {source} to rank {destination}"
        came, visits = engines.gather("_came"), engines.gather("_visits")
        _require_hit(where, came[destination][number], visits, destination, name)
        others = [(came[d][n], (1 - d, n)) for d in (0, 1) for n in range(3)]
        others.remove((came[destination][number], (source, number)))
        spared = [seen.result == ("from", *sent) for seen, sent in others]
        require(all(spared), f"{where}: {spared.count(False)} of the 5 other messages were hit too")
        require(
            len(done) == 1,
            f"{where}: took the requests {', '.join(done)}; one is enough",
        )
    return (
        "3 attacks, each by 1 request on 1 message of 6: the receiver called the function, and "
        "saw no error"
    )


def _why_no_pickle(error: Exception) -> str:
    """The meaning of an error of pickle for this attack. Other errors are raised again."""
    text = f"{type(error).__name__}: {error}"
    # Python 3.13 says "Can't get local object", and does not name pickle
    if not isinstance(error, pickle.PicklingError) and not re.search("pickle|local object", text):
        raise error
    return (
        f"pickle could not write your object, so nothing was sent ({text}). __reduce__ must return "
        f"a pair: a function, itself and not a call of it, which its reader can import by name (no "
        f"lambda, and no function inside another one), and a tuple of its arguments; a tuple of "
        f"one has a comma, (argument,)"
    )


def _require_hit(
    where: str, came: Attempt, visits: list[list[str]], destination: int, name: str
) -> None:
    require(
        not came.kind,
        f"{where}: recv_obj raised {came.kind}: {came.error}. The value must look like a message",
    )
    called = [rank for rank, names in enumerate(visits) if names]
    require(
        called == [destination],
        f"{where}: the function was called on ranks {called}, wanted {[destination]}; rank "
        f"{destination} received {came.result!r:.80}",
    )
    require(
        visits[destination] == [name],
        f"{where}: the function was called with {visits[destination]}, wanted {[name]}",
    )
    require(
        came.result == f"{name} was here",
        f"{where}: recv_obj returned {came.result!r:.80}, wanted what the function returns. Was "
        f"another message hit?",
    )


class _Recording:
    """A connection to a store that notes which requests are made."""

    def __init__(self, host: str, port: int) -> None:
        self.store: TCPStore = create_tcp_store(host, port)
        self.requests: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.requests.append(name)
        return getattr(self.store, name)


# 6.2

Tag = Callable[[bytes, str, bytes], bytes]
Pair = tuple[str, bytes]

_SECRET = b"a secret of the check"
_SEPARATORS = ["::", "||", "--", "//", "\r\n", "|:|", ", ", " : ", "key", "payload", "END"]


@exercise("6.2 the tag")
def check_tag(tag: Tag) -> str:
    """Search two different pairs of key and payload that have the same tag, and more."""
    first = tag(_SECRET, "message/0/1/0", b"1 euro")
    require(
        isinstance(first, bytes) and len(first) == TAG_BYTES,
        f"the tag is {first!r:.80}, wanted {TAG_BYTES} bytes",
    )
    require(
        tag(_SECRET, "message/0/1/0", b"1 euro") == first,
        "the same secret, key and payload have got two tags; a reader could not check that",
    )
    require(tag(b"another", "message/0/1/0", b"1 euro") != first, "the secret changes nothing")
    # HMAC replaces a secret that is longer than a block of 64 bytes by its hash (RFC 2104)
    long = bytes(range(100))
    require(
        tag(long, "k", b"p") == tag(hashlib.sha256(long).digest(), "k", b"p"),
        "this is no HMAC-SHA256 with the secret as its key: a plain hash of secret and message "
        "lets a stranger lengthen a message that it has seen. Use the module hmac",
    )
    return f"{_search_collisions(tag)} different pairs of key and payload have different tags"


def _search_collisions(tag: Tag) -> int:
    seen: dict[bytes, Pair] = {}
    tried: set[Pair] = set()
    for pair in itertools.chain(_short_pairs(), _long_pairs(), _pairs_around(_constants(tag))):
        if pair in tried:
            continue
        tried.add(pair)
        its = tag(_SECRET, *pair)
        require(
            its not in seen,
            f"{_shown(pair)} and {_shown(seen.get(its, pair))} have the same tag. Let the bytes "
            f"under the tag say where the key ends, whatever key and payload hold",
        )
        seen[its] = pair
    return len(tried)


def _shown(pair: Pair) -> str:
    texts = [(len(some), repr(some)) for some in pair]
    short = [text if len(text) < 60 else f"{text:.40}... ({size} long)" for size, text in texts]
    return f"({', '.join(short)})"


def _short_pairs() -> Iterator[Pair]:
    """All pairs of up to 3 characters each out of a few, with what separates and escapes."""
    for alphabet in ["\x00a\x01", "a1|:", '/\\"a', ",a =", "\u00e9\u00e8eE"]:
        words = ["".join(w) for n in range(4) for w in itertools.product(alphabet, repeat=n)]
        for key, payload in itertools.product(words, repeat=2):
            yield key, payload.encode()


def _long_pairs() -> Iterator[Pair]:
    """One text cut in two at every place, lengths in digits that run on, and large values."""
    text = "message/0/1/11 euro" * 40
    for cut in range(len(text) + 1):
        yield text[:cut], text[cut:].encode()
    text = "x" * 70_000  # 2 bytes are too short for a length of 65,541
    for cut in (5, 65_541):
        yield text[:cut], text[cut:].encode()
    for n, d, base in itertools.product(range(1, 10), range(10), (10, 16)):
        key, payload = "0123456789abcdef"[-9:] * 20, b"a payload"
        key = key[: base * n + d]
        # as a decimal number before the key, and after the payload
        yield key, payload
        yield str(d) + key[: n - 1], key[n - 1 :].encode() + payload
        yield key[:n], key[n:].encode() + payload
        yield key[:d], key[d:].encode() + str(n).encode()
        yield key, b""
    yield "k" * 100_000 + "a", b""
    yield "k" * 100_000 + "b", b""
    large = bytearray(2**20)
    for place in (0, 2**10, 2**16, 2**20 - 1):
        large[place] = 1
        yield "large", bytes(large)
        yield "large", bytes(large) + b"\0"


def _pairs_around(separators: list[str]) -> Iterator[Pair]:
    """Keys and payloads that hold what may stand between them."""
    for separator in separators:
        parts = ["k", "", "k\\"]  # an escape that is not escaped itself
        for left, middle, right in itertools.product(parts, repeat=3):
            rest = middle + separator + right
            yield left, rest.encode()
            yield left + separator + middle, right.encode()


def _constants(function: Tag) -> list[str]:
    """The texts that a tag may put between key and payload: separators, and those in its code."""
    found: list[Any] = [chr(number) * n for number in range(128) for n in (1, 2, 4, 8)]
    found += ["\0" * n for n in (3, 5, 16, 32)]
    found += _SEPARATORS
    if inspect.isfunction(function):
        found += _texts_of(function.__code__)
        found += [function.__globals__.get(name) for name in function.__code__.co_names]
    texts = [some.decode("latin-1") if isinstance(some, bytes) else some for some in found]
    return [some for some in texts if isinstance(some, str) and len(some) < 100]


def _texts_of(code: Any) -> list[Any]:
    inner = [some for some in code.co_consts if inspect.iscode(some)]
    return [*code.co_consts, *(text for some in inner for text in _texts_of(some))]


# 6.3

Seal = Callable[[bytes, str, bytes], bytes]
Unseal = Callable[[bytes, str, bytes], bytes]


@exercise("6.3 refuse")
def check_unseal(seal: Seal, unseal: Unseal) -> str:
    """Whatever is not exactly what was sealed is refused, in constant time and with one error."""
    key = "message/0/1/0"
    for size in (0, 1, 31, 32, 33, 1000):
        payload = (bytes(range(256)) * 4)[:size]
        opened = unseal(_SECRET, key, seal(_SECRET, key, payload))
        require(opened == payload, f"a payload of {size} bytes was opened as {opened!r:.60}")
    sealed = seal(_SECRET, key, b"pay 10 euros")
    wrong = list(_malformed(sealed))
    other = seal(b"a guess", key, b"pay 10 euros")
    wrong.append(("a value with a tag of another secret", other))
    wrong.append(("a value of another key", seal(_SECRET, "message/0/1/1", b"pay 10 euros")))
    for what, value in wrong:
        _require_refused(unseal, key, value, what, seal(_SECRET, key, value[1 + TAG_BYTES :]))
    for value in (sealed, wrong[-1][1]):
        seen = _Watched(value)
        seen.looks = []
        with suppress(AuthenticationError):
            unseal(_SECRET, key, seen)
        require(
            not seen.looks,
            f"the tag is compared by {' '.join(seen.looks[:1])}, which ends at the first wrong "
            f"byte: from its time, a stranger finds a right tag byte by byte. Use "
            f"hmac.compare_digest",
        )
    return f"6 values were opened, and {len(wrong)} wrong ones refused"


def _malformed(sealed: bytes) -> Iterator[tuple[str, bytes]]:
    for length in range(len(sealed)):
        yield f"a value that was cut off after {length} bytes", sealed[:length]
    yield "a value with a byte more", sealed + b"\0"
    yield "a value without its mark", sealed[1:]
    yield "a payload without mark and tag", sealed[1 + TAG_BYTES :]
    yield "a value with a tag of zeros", MARK + bytes(TAG_BYTES) + sealed[1 + TAG_BYTES :]
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"a value with bit {bit % 8} of byte {bit // 8} flipped", bytes(flipped)


def _require_refused(unseal: Unseal, key: str, value: bytes, what: str, sealed: bytes) -> None:
    wanted = "wanted an AuthenticationError"
    try:
        opened = unseal(_SECRET, key, value)
    except AuthenticationError as error:
        text = str(error)
    except NotImplementedError:
        raise
    except Exception as error:
        require(False, f"{what}: raised {type(error).__name__}: {error}; {wanted}")
    else:
        require(False, f"{what}: was opened as {opened!r:.60}; {wanted}")
    require(key in text, f"{what}: the error says {text!r:.80}; it must name the key, {key}")
    right = sealed[1 : 1 + TAG_BYTES]
    shown = [right.hex() in text, repr(right)[2:-1] in text, repr(right.hex()) in text]
    require(not any(shown), f"{what}: the error shows the right tag, which only ranks may know")


class _Watched(bytes):
    """Bytes that note when a piece as long as a tag is compared by ``==``, or byte by byte."""

    looks: list[str]

    def __getitem__(self, index: Any) -> Any:
        piece = super().__getitem__(index)
        if isinstance(piece, bytes):
            piece = _Watched(piece)
            piece.looks = self.looks
        return piece

    def _note(self, look: str) -> None:
        if len(self) >= TAG_BYTES:
            self.looks.append(look)

    def startswith(self, prefix: Any, *limits: Any) -> bool:
        """As that of bytes."""
        if len(prefix) >= TAG_BYTES:
            self._note("startswith")
        return super().startswith(prefix, *limits)

    def __eq__(self, other: object) -> bool:
        self._note("==")
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        self._note("!=")
        return super().__ne__(other)

    __hash__ = bytes.__hash__

    def __iter__(self) -> Iterator[int]:
        self._note("a loop")
        return super().__iter__()


# 6.4


class Facts(NamedTuple):
    """The facts that a rank knows when it seals or opens a message.

    Attributes:
        tokens: one for each rank, 32 random bytes that it made when this group formed. All ranks
            know all of them, and strangers too.
        source: the rank that sends.
        destination: the rank that receives.
        number: of the message, among those from this source to this destination, from 0.
        me: the rank that seals or opens it.
        clock: seconds on the clock of this rank.
        port: of the store.
    """

    tokens: tuple[bytes, ...]
    source: int
    destination: int
    number: int
    me: int
    clock: float
    port: int


Place = Callable[[Facts], str]

_RANKS, _NUMBERS = (0, 1, 2, 11, 12), (0, 1, 2, 11, 12, 21, 112)


@exercise("6.4 replays")
def check_place(place: Place) -> str:
    """No value is right anywhere but where it was sent, and there it always is."""
    seen: dict[str, Facts] = {}
    for facts in _sent():
        its = place(facts)
        require(isinstance(its, str), f"place returned {its!r:.60}, wanted a str")
        require(
            its not in seen,
            f"a replay is accepted: {_difference(facts, seen.get(its, facts))}, and the text under "
            f"the tag is the same, {_cut(its, 0)}",
        )
        seen[its] = facts
    for its, facts in seen.items():
        opened = place(facts._replace(me=facts.destination, clock=facts.clock + 7.5))
        pairs = zip(its, opened, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        require(
            opened == its,
            f"rank {facts.destination} refuses what rank {facts.source} really sent: the texts "
            f"under the tag differ from character {same} on, where rank {facts.source} has "
            f"{_cut(its, same)} and rank {facts.destination} has {_cut(opened, same)}. Use only "
            f"what both know to be the same",
        )
    return f"{len(seen)} messages of 4 groups: each is accepted in its place and in no other"


def _sent() -> Iterator[Facts]:
    """The messages of a group, and of three earlier ones at the same port."""
    tokens = [os.urandom(TAG_BYTES) for _ in range(max(_RANKS) + 1)]
    for source, destination in itertools.permutations(_RANKS, 2):
        for fresh in [(), (source,), (destination,), range(len(tokens))]:
            of_group = list(tokens)
            for rank in fresh:
                of_group[rank] = os.urandom(TAG_BYTES)
            for number in _NUMBERS:
                yield Facts(tuple(of_group), source, destination, number, source, 1e6, 29600)


def _cut(text: str, place: int) -> str:
    """A long text around one place, or at its start and its end."""
    if len(text) <= 100:
        return repr(text)
    if place == 0:
        return f"{text[:40]!r} ... {text[-40:]!r}"
    start, end = max(0, place - 20), place + 40
    return "... " * (start > 0) + repr(text[start:end]) + " ..." * (end < len(text))


def _difference(one: Facts, other: Facts) -> str:
    def name(facts: Facts) -> str:
        return f"message {facts.number} from rank {facts.source} to rank {facts.destination}"

    text = f"one is {name(other)}, the other is {name(one)}"
    if one.tokens == other.tokens:
        return text + " of the same group"
    new = [rank for rank, token in enumerate(one.tokens) if token != other.tokens[rank]]
    whose = "all ranks" if len(new) == len(one.tokens) else f"rank {new[0]}"
    return text + f" of another group, in which {whose} had another token"
