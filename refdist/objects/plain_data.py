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
for keys of a dict or a set that were chosen to collide, or are huge integers.
"""

import math
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch

from refdist.errors import MessageError
from refdist.objects.plain_reading import Call, Reader, refuse
from refdist.objects.unique_id import VLLM_NAME, NcclUniqueId, class_here, from_pickled

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
        reader = Reader(BytesIO(payload), len(payload), buffers)
        result = reader.load()
        if reader.named or buffers is not None:
            _check_result(result)
        return result
    except (MessageError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error) or 'it ends early'}"[:200]
        raise MessageError(f"no pickle of plain data: {reason}") from error


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
            refuse(name)


class _StorageReader(Reader):
    """Reads what torch.save wrote of a storage, which it refers to by a persistent id.

    No key in it is a tuple. The budget for those would be new for each storage of a message.
    """

    dispatch = Reader.dispatch | {pickle.BINPERSID[0]: lambda self: None}  # the id stays as it is

    def __init__(self, file: BytesIO, size: int) -> None:
        super().__init__(file, size)
        self.parts = 0


@dataclass(frozen=True)
class _Storage:
    memory: torch.UntypedStorage
    dtype: torch.dtype
    name = "a storage without a tensor"


def _bytes(reader: Reader, text: str = "", encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        refuse(f"the encoding {encoding}")
    reader.take(len(text))
    return text.encode("latin1")


def _bytearray(reader: Reader, data: bytes = b"") -> bytearray:
    reader.take(len(data))
    return bytearray(data)


def _set(reader: Reader, items: list[Any]) -> set[Any]:
    reader.take(len(items))
    reader.check_keys(items)
    return set(items)


def _size(reader: Reader, lengths: tuple[Any, ...]) -> torch.Size:
    reader.take(len(lengths))
    _check_counts(lengths)
    return torch.Size(lengths)


def _unique_id(_: Reader, __: type, state: tuple[Any, ...]) -> Any:
    attributes, data = state
    if type(attributes) is not dict or attributes or type(data) is not bytes:
        refuse("an ncclUniqueId with attributes")
    return from_pickled(data)


def _storage(_: Reader, memory: bytearray, dtype: torch.dtype) -> _Storage:
    # torch keeps the bytearray, but not from moving its memory when it grows; the view does
    tensor = torch.frombuffer(memoryview(memory), dtype=torch.uint8)
    return _Storage(tensor.untyped_storage(), dtype)


def _saved_storage(reader: Reader, data: bytes) -> _Storage:
    """Read what torch.save wrote: five pickles, the number of elements in 8 bytes, the memory."""
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
                refuse(f"a storage of {written} elements in {len(memory)} bytes")
        case _:
            refuse("a storage that torch.save did not write on a machine like this one,")
    if not memory:
        return _Storage(torch.empty(0, dtype=torch.uint8, device="cpu").untyped_storage(), dtype)
    return _storage(reader, memory, dtype)


def _tensor(
    _: Reader,
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
        refuse("a tensor with hooks")
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
        refuse(f"a {dtype} tensor of size {size}, stride {stride}, at {offset} of {held} bytes,")
    if str(dtype).startswith("torch.q"):
        refuse(f"a quantized tensor ({dtype})")


def _check_counts(numbers: tuple[Any, ...]) -> None:
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers):
        refuse("a size, a stride or an offset that is no int from 0 to 2**63 - 1")


def _check_flags(dtype: torch.dtype, flags: dict[Any, Any]) -> None:
    allowed = {"conj": dtype.is_complex, "neg": dtype is not torch.bool}
    for name, value in flags.items():
        if type(value) is not bool or not allowed.get(name):
            refuse(f"a {dtype} tensor with metadata other than what torch has for its views")


def _parameter(
    _: Reader, data: torch.Tensor, requires_grad: bool, hooks: OrderedDict[Any, Any]
) -> torch.nn.Parameter:
    if hooks:
        refuse("a parameter with hooks")
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
Reader.names = {
    VLLM_NAME: NcclUniqueId,
    (NcclUniqueId.__module__, NcclUniqueId.__name__): NcclUniqueId,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES},
}
for _name, _make, _signatures in _CALLS:
    _module, _, _function = _name.rpartition(".")
    _call = Call(_name, _make, frozenset(_signatures))
    Reader.names[_module, _function] = _call
    # protocol 2 has the name of Python 2
    Reader.names[_module.replace("builtins", "__builtin__"), _function] = _call

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
_LEAVES = {type(None), bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype}
_LEAVES |= {torch.Tensor, torch.nn.Parameter}
