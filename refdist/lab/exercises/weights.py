"""Checks of notebook 08: chunks of weights, their bytes, one order on all ranks, and a hand-over.

The first two run in the notebook's process. The others run the answer on the engines, where the
notebook has defined it, in groups of their own over the store of the engines' ``group``.
"""

import random
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore

from refdist import StatelessProcessGroup, create_tcp_store
from refdist.benchmarks.weights import qwen_weights
from refdist.lab.attempts import Attempt, attempt
from refdist.lab.engines import LocalEngines
from refdist.lab.exercises import exercise, require
from refdist.lab.exercises.trying import defined_here, interrupted_after
from refdist.weights.chunks import cut as cut_as_vllm
from refdist.weights.descriptions import Weight

_SECONDS = 5.0  # for what another rank sends at once, on a busy machine
_CALL_SECONDS = 20.0  # for all that an answer does in one call


# 8.1

_Cut = Callable[[list[int], int], Sequence[Sequence[int]]]
_RANDOM_LISTS = 500
_BUFFERS = 2**30, 2**28, 2**24


@exercise("8.1 the chunks of a model")
def check_cut(cut: _Cut) -> str:
    """Check the function on many lists of sizes, and on the weights of Qwen2.5-0.5B."""
    for sizes, buffer_bytes in _cases_of_cut():
        given = list(sizes)
        found = [list(chunk) for chunk in cut(given, buffer_bytes)]
        wanted = _chunks(sizes, buffer_bytes)
        require(
            found == wanted and given == sizes,
            f"cut({sizes}, {buffer_bytes}) returned {found}; wanted: {wanted}",
        )
    with torch.device("meta"):  # names and shapes without memory
        sizes = [tensor.nbytes for tensor in qwen_weights().values()]
    counts = []
    for buffer_bytes in _BUFFERS:
        found, wanted = [list(c) for c in cut(sizes, buffer_bytes)], _chunks(sizes, buffer_bytes)
        require(
            found == wanted,
            f"the {len(sizes)} weights of Qwen2.5-0.5B with a buffer of {buffer_bytes:,} bytes "
            f"came in {len(found)} chunks; wanted: {len(wanted)}, as vLLM cuts them",
        )
        counts.append(f"{len(found)} with {buffer_bytes // 2**20:,} MiB")
    return (
        f"{_RANDOM_LISTS} lists are cut as vLLM does. The {len(sizes)} weights of Qwen2.5-0.5B, "
        f"{sum(sizes):,} bytes, take {', '.join(counts)}."
    )


def _cases_of_cut() -> list[tuple[list[int], int]]:
    cases: list[tuple[list[int], int]] = [
        ([4, 4, 4], 10), ([4, 4, 4], 8), ([20], 8), ([1, 20, 1], 8), ([], 8), ([0, 0], 8),
        ([8, 0, 1], 8),
    ]  # fmt: skip
    chance = random.Random(8)
    for _ in range(_RANDOM_LISTS - len(cases)):
        buffer_bytes = chance.randint(1, 20)
        number = chance.randint(0, 12)
        cases.append(([chance.randint(0, 2 * buffer_bytes) for _ in range(number)], buffer_bytes))
    return cases


def _chunks(sizes: Sequence[int], buffer_bytes: int) -> list[list[int]]:
    """The places of the weights in each chunk, as the package cuts them."""
    weights = [Weight(str(place), (size,), torch.uint8) for place, size in enumerate(sizes)]
    return [
        list(range(chunk.first, chunk.first + len(chunk.weights)))
        for chunk in cut_as_vllm(weights, packed=True, buffer_bytes=buffer_bytes)
    ]


# 8.2

_Pack = Callable[[list[torch.Tensor]], torch.Tensor]
_Unpack = Callable[[torch.Tensor, list[torch.Tensor]], Sequence[torch.Tensor]]
_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
_SHAPES: tuple[tuple[int, ...], ...] = (
    (), (1,), (3,), (5,), (2, 3), (3, 1, 2), (0,), (2, 0, 3), (7, 5),
)  # fmt: skip
_LISTS_OF_TENSORS = 200


@exercise("8.2 tensors as bytes")
def check_pack(pack: _Pack, unpack: _Unpack) -> str:
    """Check both functions, each without the other, and bit by bit."""
    chance = random.Random(8)
    number, odd = 0, 0
    for tensors in _lists_of_tensors(chance):
        number += len(tensors)
        what = ", ".join(f"{_dtype(t)} {tuple(t.shape)}" for t in tensors)
        wanted = b"".join(map(_bytes, tensors))
        packed = pack(list(tensors))
        _check_bytes(packed, wanted, what)
        require(
            [_bytes(tensor) for tensor in tensors] == _parts(wanted, tensors),
            f"pack changed what it was given: {what}",
        )
        data = torch.frombuffer(bytearray(wanted or b"?"), dtype=torch.uint8)[: len(wanted)]
        like = [torch.zeros(t.shape, dtype=t.dtype) for t in tensors]
        found = list(unpack(data, list(like)))
        _check_tensors(found, tensors, _parts(wanted, tensors), what)
        require(
            not any(any(_bytes(tensor)) for tensor in like),
            f"unpack wrote to the tensors of `like`; wanted: new ones, for {what}",
        )
        offset = 0
        for tensor in tensors:
            odd += offset % tensor.element_size() != 0
            offset += tensor.nbytes
    return (
        f"{number:,} tensors of {len(_DTYPES)} dtypes in {_LISTS_OF_TENSORS} lists, bit by bit; "
        f"{odd} of them do not begin at a multiple of their elements' size."
    )


def _lists_of_tensors(chance: random.Random) -> list[list[torch.Tensor]]:
    plain = torch.arange(6, dtype=torch.float32)
    lists = [[plain], [plain, plain.reshape(2, 3).t()], [torch.tensor(7)]]
    lists += [[torch.ones(3, dtype=torch.bfloat16), plain]]
    while len(lists) < _LISTS_OF_TENSORS:
        lists.append([_tensor(chance) for _ in range(chance.randint(1, 6))])
    return lists


def _tensor(chance: random.Random) -> torch.Tensor:
    """A tensor of any bits, NaNs among them; some with gaps, or transposed."""
    dtype, shape = chance.choice(_DTYPES), chance.choice(_SHAPES)
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        flat = torch.tensor([chance.random() < 0.5 for _ in range(count)], dtype=dtype)
    else:
        memory = bytearray(chance.randbytes(count * dtype.itemsize) or b"?" * dtype.itemsize)
        flat = torch.frombuffer(memory, dtype=dtype)[:count]
    tensor = flat.reshape(shape)
    kind = chance.randrange(3)
    if kind == 1 and tensor.dim() >= 2:
        return tensor.transpose(0, 1)
    if kind == 2 and tensor.numel() > 1:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensor


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: torch.Tensor) -> bytes:
    """The elements in row-major order, as the machine has them."""
    if tensor.dtype == torch.bfloat16:  # which numpy lacks
        tensor = tensor.contiguous().view(torch.int16)
    return tensor.numpy().tobytes()


def _parts(data: bytes, tensors: Sequence[torch.Tensor]) -> list[bytes]:
    parts, offset = [], 0
    for tensor in tensors:
        parts.append(data[offset : offset + tensor.nbytes])
        offset += tensor.nbytes
    return parts


def _check_bytes(packed: Any, wanted: bytes, what: str) -> None:
    require(
        isinstance(packed, torch.Tensor) and packed.dtype == torch.uint8 and packed.dim() == 1,
        f"pack returned {_told(packed)} for {what}; wanted: a uint8 tensor of one dimension",
    )
    require(
        len(packed) == len(wanted),
        f"pack returned {len(packed)} bytes for {what}; wanted: {len(wanted)}",
    )
    found = bytes(packed.tolist())
    first = next(
        (n for n, pair in enumerate(zip(found, wanted, strict=True)) if len({*pair}) > 1), 0
    )
    require(
        found == wanted,
        f"pack of {what}: byte {first} of {len(wanted)} is wrong. The bytes are those of the "
        f"elements in row-major order, one tensor after the other",
    )


def _check_tensors(
    found: list[Any], tensors: Sequence[torch.Tensor], parts: list[bytes], what: str
) -> None:
    require(
        len(found) == len(tensors),
        f"unpack returned {len(found)} tensors for {what}; wanted: {len(tensors)}",
    )
    for place, (one, like, part) in enumerate(zip(found, tensors, parts, strict=True)):
        require(
            isinstance(one, torch.Tensor) and one.shape == like.shape and one.dtype == like.dtype,
            f"unpack of {what}: tensor {place} is {_told(one)}; wanted: {_told(like)}",
        )
        require(_bytes(one) == part, f"unpack of {what}: tensor {place} has other bits")


def _told(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {_dtype(value)} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


# An answer is tried on the engines.


# a server of torch may not answer a connection that opens while others close, so this one stays
@cache
def _connect(host: str, port: int) -> TCPStore:
    return create_tcp_store(host, port)


def _group_of(rank: int, world_size: int, name: str) -> StatelessProcessGroup:
    """On an engine: a new group of all engines, over the store of their ``group``."""
    group = defined_here("group")
    store = PrefixStore(name, _connect(group.host, group.port))
    store.set_timeout(timedelta(seconds=_SECONDS))
    return StatelessProcessGroup(rank, world_size, store)


def _tried(function: Callable[..., Any], *arguments: Any) -> Attempt:
    """Call an answer, and keep its error; a stub raises."""
    with interrupted_after(_CALL_SECONDS):
        made = attempt(function, *arguments)
    if made.kind == "NotImplementedError":
        raise NotImplementedError
    return made


# 8.3

_METAS = [
    ("steps", (), "int64"),
    ("norm.weight", (6,), "float32"),
    ("query.weight", (4, 6), "float32"),
    ("key.weight", (4, 6), "float32"),
    ("head.weight", (6,), "float32"),
]
_Metas = list[tuple[str, tuple[int, ...], str]]
_MOST_CALLS = 2


class _CountedGroup:
    """A group whose calls are counted and end in time."""

    def __init__(self, group: StatelessProcessGroup) -> None:
        self._group = group
        self.rank, self.world_size, self.calls = group.rank, group.world_size, 0

    def __getattr__(self, name: str) -> Any:
        called = getattr(self._group, name)
        if not callable(called):
            return called

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return called(*arguments, **{"timeout": _SECONDS, **options})

        return call


def _compare(rank: int, world_size: int, name: str, metas: list[_Metas]) -> tuple[Attempt, int]:
    """On an engine: call the answer, and count its calls."""
    counted = _CountedGroup(_group_of(rank, world_size, name))
    return _tried(defined_here("same_on_all"), list(metas[rank]), counted), counted.calls


def _changed(place: int, *meta: Any) -> _Metas:
    return [*_METAS[:place], *([meta] if meta else []), *_METAS[place + 1 :]]


def _cases_of_metas(last: int) -> dict[str, dict[int, tuple[_Metas, str]]]:
    """A case: some ranks expect other weights than ``_METAS``; and the first that differs."""
    exchanged = [*_METAS[:2], _METAS[3], _METAS[2], _METAS[4]]
    turned = _changed(3, "key.weight", (6, 4), "float32")
    as_integers = _changed(1, "norm.weight", (6,), "int32")
    return {
        "all expect the same": {},
        "rank 1 exchanges two weights": {1: (exchanged, "query.weight")},
        f"rank {last} has another dtype": {last: (as_integers, "norm.weight")},
        "rank 1 has a matrix transposed": {1: (turned, "key.weight")},
        f"rank {last} lacks the last weight": {last: (_changed(4), "head.weight")},
        "rank 1 has a weight more": {1: ([*_METAS, ("bias", (6,), "float32")], "bias")},
        "rank 1 has another name": {1: (_changed(4, "lm_head", (6,), "float32"), "head.weight")},
        f"ranks 1 and {last} differ": {
            1: (turned, "key.weight"), last: (as_integers, "norm.weight"),
        },
        "all expect the same once more": {},
    }  # fmt: skip


@exercise("8.3 one order on all ranks")
def check_same_on_all(engines: LocalEngines) -> str:
    """Check the function ``same_on_all`` of the engines, which have a ``group``."""
    most = 0
    cases = _cases_of_metas(engines.n - 1)
    for where, differ in cases.items():
        metas = [differ.get(rank, (_METAS, ""))[0] for rank in range(engines.n)]
        found = engines.run(_compare, uuid.uuid4().hex, metas)
        for rank, (made, _) in enumerate(found):
            _check_comparison(where, rank, made, differ, engines.n)
        most = max(most, *(calls for _, calls in found))
    require(most <= _MOST_CALLS, f"a rank made {most} calls of the group; wanted: at most 2")
    return f"{len(cases)} cases; a rank made at most {most} calls of the group."


def _check_comparison(
    where: str, rank: int, made: Attempt, differ: dict[int, tuple[_Metas, str]], world_size: int
) -> None:
    if not differ:
        require(
            not made.kind and made.result is None,
            f"{where}: rank {rank} {made}; wanted: None, without an error",
        )
        return
    told = f"{where}: rank {rank} {made}; wanted: a ValueError, on every rank"
    require(made.kind == "ValueError", told)
    for other, (_, name) in differ.items():
        require(
            f"rank {other}" in made.error and name in made.error,
            f'{told}, whose text names "rank {other}" and {name!r}',
        )
    same = [other for other in range(1, world_size) if other not in differ]
    for other in same:
        require(
            f"rank {other}" not in made.error,
            f"{told}, without rank {other}, which expects the same",
        )


# 8.4


class _Model(torch.nn.Module):
    """A model of a few weights, among them a number."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(value))
        for name, size in (("first", 3), ("second", 5), ("third", 2)):
            weight = torch.nn.Parameter(torch.full((size,), float(value)))
            self.register_parameter(name, weight)


class _Breaking:
    """A communicator over a group, which breaks on one rank before one of its broadcasts."""

    def __init__(self, group: StatelessProcessGroup, breaks_at: int | None) -> None:
        self._group, self._left = group, breaks_at
        self.rank, self.world_size = group.rank, group.world_size

    def broadcast(self, tensor: torch.Tensor, src: int, timeout: float = _SECONDS) -> torch.Tensor:
        if self._left == 0:
            raise RuntimeError("the connection to the other ranks broke")
        if self._left is not None:
            self._left -= 1
        sent: torch.Tensor = self._group.broadcast_obj(tensor, src, min(timeout, _SECONDS))
        return sent


_OLD, _NEW = 7, 8
_BROKEN_SECONDS = 0.3  # for a weight that may not come
_Case = tuple[int, int] | None  # the rank on which it breaks, and before which broadcast


def _hand_over(
    rank: int, world_size: int, name: str, case: _Case
) -> tuple[Attempt, list[list[float]], bool]:
    """On an engine: call the answer. Then the weights, and whether they are in other memory."""
    control = _CountedGroup(_group_of(rank, world_size, f"{name} control"))
    breaks_at = case[1] if case and case[0] == rank else None
    data = _Breaking(_group_of(rank, world_size, f"{name} data"), breaks_at)
    model = _Model(_NEW if rank == 0 else _OLD)
    places = [weight.data_ptr() for weight in model.state_dict().values()]
    seconds = _BROKEN_SECONDS if case else _SECONDS
    made = _tried(defined_here("hand_over"), model, data, control, seconds)
    weights = model.state_dict().values()
    moved = [weight.data_ptr() for weight in weights] != places
    return made, [weight.reshape(-1).tolist() for weight in weights], moved


@exercise("8.4 all of them or none")
def check_hand_over(engines: LocalEngines) -> str:
    """Check the function ``hand_over`` of the engines, which have a ``group``."""
    count = len(_Model(0).state_dict())
    breaking = [(rank, at) for at in (0, 1, count - 1) for rank in range(engines.n)]
    cases: list[_Case] = [None, *breaking, None]
    for case in cases:
        where, wanted = "nothing breaks", f"{_NEW} everywhere, the new weights"
        if case is not None:
            where = f"the connection of rank {case[0]} breaks before weight {case[1]} of {count}"
            wanted = f"{_OLD} everywhere, the old weights"
        found = engines.run(_hand_over, uuid.uuid4().hex, case)
        for rank, (made, weights, moved) in enumerate(found):
            require(
                made.result is (case is None),
                f"{where}: rank {rank} {made}; wanted: {case is None} on every rank",
            )
            value = _NEW if rank == 0 or case is None else _OLD
            require(
                all(number == value for weight in weights for number in weight),
                f"{where}: rank {rank} has {weights}; wanted: {wanted}",
            )
            require(
                not moved,
                f"{where}: the weights of rank {rank} are in other memory than before",
            )
    return (
        f"{len(cases)} hand-overs, of which {len(breaking)} broke: on each rank, before the first, "
        f"the second and the last weight. Each time all ranks had the new weights, or all the old."
    )
