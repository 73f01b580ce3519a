"""Unpickling that runs nothing: it makes plain data and CPU tensors, or raises.

``pickle.loads`` calls what a message names. A ``find_class`` that knows only a few names is not
enough: BUILD sets attributes of any object, the unpickler in C takes gigabytes for one memo index,
and a key of nested tuples ends the process. torch's weights-only unpickler ends on such a key, too,
reads protocol 2 alone, and allows whatever the process has added to its safe globals.

So this is Python's own unpickler in Python, with the opcodes that pickle writes for such data since
protocol 2; it refuses the others. It looks names up in a table and imports nothing. It calls only
functions of this module, with arguments of the types that the table lists. What it has made is
checked once more before it leaves, because a message may put parts of tensors anywhere.

The memory that a message takes is at most in proportion to its length. Its time is, too, except
for keys that were chosen to collide in a dict or a set.
"""

import functools
import math
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar, NoReturn

import torch

from refdist.errors import MessageError
from refdist.objects.unique_id import VLLM_NAME, NcclUniqueId, class_here, from_pickled

_RULE = (
    "a plain message holds only None, bool, int, float, complex, str, bytes, bytearray, list, "
    "tuple, dict, OrderedDict, set, frozenset, and CPU tensors, sizes and dtypes of torch"
)
_KEY_LEVELS = 100  # the hash of nested tuples is computed by recursion in C
_KEY_PARTS = 1 << 20  # of all keys; a part that is shared counts again, as it is hashed again
_EXPANDED_BYTES = 1 << 32  # with strides of 0, a tensor may look larger than its memory
_DIMENSIONS = 64  # more than torch's functions take


def loads(payload: Any, buffers: Iterable[bytearray] | None = None) -> Any:
    """The object of a pickle of protocol 2 to 5, if it is plain.

    Args:
        payload: the pickle; bytes or alike.
        buffers: what a pickle of protocol 5 left out of band. Tensors use this memory.

    Returns:
        What ``_RULE`` lists, and ids of ``unique_id.class_here()``, nested and shared as they were
        sent. Every tensor is a ``torch.Tensor`` or ``torch.nn.Parameter`` inside its storage.

    Raises:
        MessageError: it is something else, which the text names, or no pickle.
        MemoryError: no room.
    """
    try:
        reader = _Reader(BytesIO(payload), len(payload), buffers)
        result = reader.load()
        if reader.named or buffers is not None:
            _check_result(result)
        return result
    except (MessageError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error) or 'it ends early'}"[:200]
        raise MessageError(f"no pickle of plain data: {reason}") from error


_Base: Any = pickle._Unpickler  # not pickle.Unpickler, whose handlers cannot be replaced


class _Reader(_Base):  # type: ignore[misc]
    """Reads one pickle of a file of ``size`` bytes."""

    names: ClassVar[dict[tuple[str, str], Any]]  # what a message may name
    dispatch: ClassVar[dict[int, Callable[..., Any]]]  # by opcode

    def __init__(
        self, file: BytesIO, size: int, buffers: Iterable[bytearray] | None = None
    ) -> None:
        super().__init__(file, buffers=buffers)
        self.named = False  # whether a name was looked up
        # no call makes more bytes than the message has; twice, as protocol 2 converts bytes first
        self.room = 2 * size
        self.parts = _KEY_PARTS + 16 * size

    def find_class(self, module: str, name: str) -> Any:
        self.named = True
        if (module, name) not in self.names:
            _refuse(f"{module}.{name}")
        return self.names[module, name]

    def top(self, *kinds: type) -> Any:
        """The last object. It must be of one of these types: a message changes no others."""
        if type(self.stack[-1]) not in kinds:
            _refuse(f"an item or attribute of {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def check_keys(self, keys: list[Any]) -> None:
        """Refuse keys whose hashes take for ever or end the process: shared parts, deep ones."""
        level, levels = [key for key in keys if type(key) in _NESTED], 0
        while level:
            self.parts -= sum(map(len, level))
            levels += 1
            if self.parts < 0 or levels > _KEY_LEVELS:
                _refuse(f"a key with {levels} levels of tuples, or with too many parts,")
            level = [part for whole in level for part in whole if type(part) in _NESTED]

    def take(self, size: int) -> None:
        """Count what a call makes: a message may make the same call many times."""
        self.room -= size
        if self.room < 0:
            _refuse("a message that grows")

    def load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        data = bytearray(self.read(min(size, sys.maxsize)))
        if len(data) < size:
            raise EOFError(f"{size} bytes are announced, {len(data)} follow")
        self.append(data)

    def load_append(self) -> None:
        item = self.stack.pop()
        self.top(list).append(item)

    def load_appends(self) -> None:
        items = self.pop_mark()
        self.top(list).extend(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.check_keys([key])
        self.top(dict, OrderedDict)[key] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        keys, values = items[::2], items[1::2]
        self.check_keys(keys)
        self.top(dict, OrderedDict).update(zip(keys, values, strict=True))

    def load_additems(self) -> None:
        items = self.pop_mark()
        self.check_keys(items)
        self.top(set).update(items)

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.check_keys(items)
        self.append(frozenset(items))

    def load_build(self) -> None:
        state = self.stack.pop()
        # torch's state dicts have this attribute; another might hide a method
        if type(state) is not dict or list(state) != ["_metadata"]:
            _refuse(f"an attribute of {type(self.stack[-1]).__name__}")
        vars(self.top(OrderedDict)).update(state)

    def load_reduce(self) -> None:
        args, call = self.stack.pop(), self.stack.pop()
        if type(call) is not _Call or type(args) is not tuple:
            _refuse(f"a call of {type(call).__name__}")
        if tuple(map(type, args)) not in call.signatures:
            _refuse(f"{call.name} of ({', '.join(type(arg).__name__ for arg in args[:9])})")
        self.append(call.make(self, *args))

    def refuse(self, code: int) -> NoReturn:
        """The handler of every other opcode."""
        if code == pickle.INST[0]:
            _refuse(b".".join(self.readline().strip() for _ in range(2)).decode(errors="replace"))
        opcodes = [name for name in pickle.__all__ if vars(pickle)[name] == bytes([code])]
        _refuse(f"the opcode {' '.join(opcodes) or code}")


_AS_PICKLE = (
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 "
    "BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 "
    "NEXT_BUFFER EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET "
    "BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL"
)
_CHECKED = "BYTEARRAY8 APPEND APPENDS SETITEM SETITEMS ADDITEMS FROZENSET BUILD REDUCE"
_Reader.dispatch = {
    **{code: functools.partial(_Reader.refuse, code=code) for code in range(256)},
    **{code: _Base.dispatch[code] for (code,) in map(vars(pickle).__getitem__, _AS_PICKLE.split())},
    **{vars(pickle)[op][0]: getattr(_Reader, f"load_{op.lower()}") for op in _CHECKED.split()},
}


class _StorageReader(_Reader):
    """Reads what torch.save wrote of a storage, which it refers to by a persistent id."""

    dispatch = _Reader.dispatch | {pickle.BINPERSID[0]: lambda self: None}  # the id stays as it is


def _refuse(what: str) -> NoReturn:
    what = what if len(what) <= 300 else f"{what[:300]}..."
    raise MessageError(f"{what if what.isprintable() else ascii(what)} is not read: {_RULE}")


def _check_result(result: Any) -> None:
    """Refuse an object with a function, a class or a storage of the table in it."""
    left, seen = [result], set()
    while left:
        obj = left.pop()
        kind = type(obj)
        if kind in _LEAVES or id(obj) in seen:
            continue
        seen.add(id(obj))
        if kind in (list, tuple, set, frozenset):
            left.extend(obj)
        elif kind in (dict, OrderedDict):
            left.extend(obj)
            left.extend(obj.values())
            left.extend(getattr(obj, "__dict__", {}).values())
        elif kind is not class_here():
            name: str = getattr(obj, "name", getattr(obj, "__name__", kind.__name__))
            _refuse(name)


@dataclass(frozen=True)
class _Call:
    """What a name of a function stands for; ``make`` gets the reader and the arguments."""

    name: str
    make: Callable[..., Any]
    signatures: frozenset[tuple[type, ...]]


@dataclass(frozen=True)
class _Storage:
    memory: torch.UntypedStorage
    dtype: torch.dtype
    name = "a storage without a tensor"


def _bytes(reader: _Reader, text: str = "", encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        _refuse(f"the encoding {encoding}")
    reader.take(len(text))
    return text.encode("latin1")


def _bytearray(reader: _Reader, data: bytes = b"") -> bytearray:
    reader.take(len(data))
    return bytearray(data)


def _set(reader: _Reader, items: list[Any]) -> set[Any]:
    reader.take(len(items))
    reader.check_keys(items)
    return set(items)


def _size(reader: _Reader, lengths: tuple[Any, ...]) -> torch.Size:
    reader.take(len(lengths))
    _check_counts(lengths)
    return torch.Size(lengths)


def _unique_id(_: _Reader, __: type, state: tuple[Any, ...]) -> Any:
    attributes, data = state
    if type(attributes) is not dict or attributes or type(data) is not bytes:
        _refuse("an ncclUniqueId with attributes")
    return from_pickled(data)


def _storage(_: _Reader, memory: bytearray, dtype: torch.dtype) -> _Storage:
    # torch keeps the bytearray, but not from moving its memory when it grows; the view does
    tensor = torch.frombuffer(memoryview(memory), dtype=torch.uint8)
    return _Storage(tensor.untyped_storage(), dtype)


def _saved_storage(reader: _Reader, data: bytes) -> _Storage:
    """What torch.save wrote: five pickles, the number of elements in 8 bytes, and the memory."""
    reader.take(len(data))
    file = BytesIO(data)
    match [_StorageReader(file, len(data)).load() for _ in range(5)]:
        case [
            torch.serialization.MAGIC_NUMBER,
            torch.serialization.PROTOCOL_VERSION,
            {"little_endian": little},
            ("storage", torch.dtype() as dtype, str() as key, str(), int() as count, None),
            [str() as only],
        ] if key == only and little is (sys.byteorder == "little"):
            written, memory = int.from_bytes(file.read(8), sys.byteorder), bytearray(file.read())
            if written != count or len(memory) != count * dtype.itemsize:
                _refuse(f"a storage of {written} elements in {len(memory)} bytes")
        case _:
            _refuse("a storage that torch.save did not write on a machine like this one,")
    if not memory:
        return _Storage(torch.empty(0, dtype=torch.uint8, device="cpu").untyped_storage(), dtype)
    return _storage(reader, memory, dtype)


def _tensor(
    _: _Reader,
    dtype: torch.dtype,
    storage: _Storage,
    offset: int,
    size: tuple[Any, ...],
    stride: tuple[Any, ...],
    requires_grad: bool,
    hooks: OrderedDict[Any, Any],
    flags: dict[Any, Any] | None = None,
) -> torch.Tensor:
    if hooks:
        _refuse("a tensor with hooks")
    _check_bounds(storage.memory.nbytes(), dtype, offset, size, stride)
    tensor = torch.empty(0, dtype=dtype, device="cpu")
    tensor.set_(storage.memory, offset, size, stride)
    tensor.requires_grad_(requires_grad)
    if flags:
        _check_flags(dtype, flags)
        set_metadata: Any = torch._utils.set_tensor_metadata
        set_metadata(tensor, flags)
    return tensor


def _check_bounds(
    held: int, dtype: torch.dtype, offset: int, size: tuple[Any, ...], stride: tuple[Any, ...]
) -> None:
    """Refuse a tensor beyond its ``held`` bytes: torch would make room, with what is there."""
    _check_counts((offset, *size, *stride))
    elements = math.prod(max(length, 1) for length in size)
    end = offset
    if 0 not in size:
        end += 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=False))
    inside = end * dtype.itemsize <= held and len(size) == len(stride) <= _DIMENSIONS
    if not inside or elements * dtype.itemsize > max(held, _EXPANDED_BYTES):
        _refuse(f"a {dtype} tensor of size {size}, stride {stride}, at {offset} of {held} bytes,")
    if str(dtype).startswith("torch.q"):
        _refuse(f"a quantized tensor ({dtype})")


def _check_counts(numbers: tuple[Any, ...]) -> None:
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers):
        _refuse("a size, a stride or an offset that is no int from 0 to 2**63 - 1")


def _check_flags(dtype: torch.dtype, flags: dict[Any, Any]) -> None:
    allowed = {"conj": dtype.is_complex, "neg": dtype is not torch.bool}
    for name, value in flags.items():
        if type(value) is not bool or not allowed.get(name):
            _refuse(f"a {dtype} tensor with metadata other than what torch has for its views")


def _parameter(
    _: _Reader, data: torch.Tensor, requires_grad: bool, hooks: OrderedDict[Any, Any]
) -> torch.nn.Parameter:
    if hooks:
        _refuse("a parameter with hooks")
    return torch.nn.Parameter(data, requires_grad)


_V2: tuple[type, ...] = (_Storage, int, tuple, tuple, bool, OrderedDict)
_V3 = (*_V2, torch.dtype)
_CALLS: list[tuple[str, Callable[..., Any], list[tuple[type, ...]]]] = [
    ("builtins.bytes", _bytes, [()]),
    ("_codecs.encode", _bytes, [(str, str)]),
    ("builtins.bytearray", _bytearray, [(), (bytes,)]),
    ("builtins.complex", lambda _, real, imag: complex(real, imag), [(float, float)]),
    ("builtins.set", _set, [(list,)]),
    ("builtins.frozenset", lambda *args: frozenset(_set(*args)), [(list,)]),
    ("collections.OrderedDict", lambda _: OrderedDict(), [()]),
    ("torch.Size", _size, [(tuple,)]),
    (
        "torch._utils._rebuild_tensor_v2",
        lambda reader, storage, *args: _tensor(reader, storage.dtype, storage, *args),
        [_V2, (*_V2, dict)],
    ),
    (
        "torch._utils._rebuild_tensor_v3",
        lambda reader, *args: _tensor(reader, args[6], *(args[:6] + args[7:])),
        [_V3, (*_V3, dict)],
    ),
    ("torch._utils._rebuild_parameter", _parameter, [(torch.Tensor, bool, OrderedDict)]),
    ("torch.storage._load_from_bytes", _saved_storage, [(bytes,)]),
    ("refdist.objects.storages._storage_from", _storage, [(bytearray, torch.dtype)]),
    ("_ctypes._unpickle", _unique_id, [(type(NcclUniqueId), tuple)]),
]
_DTYPES = {value for value in vars(torch).values() if type(value) is torch.dtype}
_Reader.names = {
    VLLM_NAME: NcclUniqueId,
    (NcclUniqueId.__module__, NcclUniqueId.__name__): NcclUniqueId,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES},
}
for _name, _make, _signatures in _CALLS:
    _module, _, _function = _name.rpartition(".")
    _call = _Call(_name, _make, frozenset(_signatures))
    _Reader.names[_module, _function] = _call
    # protocol 2 has the name of Python 2
    _Reader.names[_module.replace("builtins", "__builtin__"), _function] = _call

_StorageReader.names = {("torch.storage", "UntypedStorage"): torch.uint8} | {
    ("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
    }.items()
}
_NESTED = (tuple, frozenset, torch.Size)
_LEAVES = {type(None), bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype}
_LEAVES |= {torch.Tensor, torch.nn.Parameter}
