"""Plain messages: what round-trips, what is refused, and that nothing a message names is run.

``python tests/test_plain_data.py --inputs 1000000`` reads more hostile pickles than the tests do.
"""

import argparse
import copyreg
import ctypes
import datetime
import decimal
import enum
import faulthandler
import io
import json
import os
import pickle
import pickletools
import random
import re
import resource
import struct
import subprocess
import sys
import tempfile
import types
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path

import pytest
import torch

from refdist.errors import MessageError
from refdist.objects import plain_data, unique_id
from refdist.objects.encoding import Decoder, encode
from refdist.objects.plain_data import loads
from refdist.objects.unique_id import NcclUniqueId, pickled_for_vllm

# --- a hostile module: it records whatever is called, and everything in it has a name

CALLED = []


class Canary:
    def __new__(cls, *args, **kwargs):
        CALLED.append("__new__")
        return super().__new__(cls)

    def __setstate__(self, state):
        CALLED.append("__setstate__")

    def __setattr__(self, name, value):
        CALLED.append("__setattr__")

    def __getattr__(self, name):
        CALLED.append(f"__getattr__ {name}")
        raise AttributeError(name)

    def __hash__(self):
        CALLED.append("__hash__")
        return 1

    def __call__(self, *args):
        CALLED.append("__call__")


def run(*args, **kwargs):
    CALLED.append("run")
    return args


def hostile_module():
    module = types.ModuleType("canary")
    module.Canary, module.run, module.instance = Canary, run, object.__new__(Canary)
    Canary.__module__ = run.__module__ = "canary"
    sys.modules["canary"] = module
    for code, name in ((1, "run"), (300, "Canary"), (70_000, "instance")):
        copyreg.add_extension("canary", name, code)


hostile_module()


@pytest.fixture(autouse=True)
def nothing_is_called():
    CALLED.clear()
    yield
    assert CALLED == []


# --- pickles by hand


def glob(name):
    return b"c%s\n%s\n" % tuple(part.encode() for part in name.rpartition(".")[::2])


def put(value):
    """What pushes a plain value."""
    return pickle.dumps(value, 3)[2:-1]


def call(name, *args):
    return glob(name) + b"(" + b"".join(args) + b"tR"


def whole(*parts):
    return b"\x80\x05" + b"".join(parts) + b"."


HOOKS = call("collections.OrderedDict")
V2, V3 = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
FROM, LOAD = "refdist.objects.storages._storage_from", "torch.storage._load_from_bytes"


def memory(length, dtype="float32"):
    """A storage as refdist's ranks send it."""
    held = pickle.BYTEARRAY8 + struct.pack("<Q", length) + bytes(length)
    return call(FROM, held, glob(f"torch.{dtype}"))


def tensor(offset=0, size=(2,), stride=(1,), grad=False, hooks=HOOKS, more=b"", storage=None):
    storage = memory(8) if storage is None else storage
    rest = (put(offset), put(size), put(stride), put(grad), hooks, more)
    return call(V2, storage, *rest)


def saved(storage):
    """The bytes in which pickle holds a storage."""
    file = io.BytesIO()
    torch.save(storage, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


HEAD = saved(torch.UntypedStorage(0))[:137]  # three pickles: magic number, version, machine


def refused(payload, text, buffers=None):
    with pytest.raises(MessageError, match=re.escape(text)) as caught:
        loads(payload, buffers)
    assert len(str(caught.value)) < 700


# --- round trips


def by_pickle(protocol):
    return lambda obj: loads(pickle.dumps(obj, protocol))


def by_encoding(obj):
    encoded = encode(obj)
    decoder = Decoder("key", encoded.value)
    for chunk in encoded.chunks():
        decoder.add("key", chunk)
    return loads(decoder.payload, decoder.parts or None)


each_way = pytest.mark.parametrize(
    "through",
    [*(pytest.param(by_pickle(n), id=f"protocol {n}") for n in (2, 3, 4, 5)), by_encoding],
)


def assert_same(a, b, seen):
    """Equal in value, in type at every depth, and in what is shared."""
    assert type(a) is type(b)
    if isinstance(a, list | dict | set | bytearray | torch.Tensor):
        if id(a) in seen:
            assert seen[id(a)] is b
            return
        seen[id(a)] = b
    if isinstance(a, torch.Tensor):
        for what in ("dtype", "shape", "requires_grad", "device"):
            assert getattr(a, what) == getattr(b, what)
        for what in ("stride", "storage_offset", "is_conj", "is_neg"):
            assert getattr(a, what)() == getattr(b, what)()
        assert not b._backward_hooks
        assert torch.equal(memory_of(a), memory_of(b))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert_same(tuple(a.values()), tuple(b.values()), seen)
        assert_same(getattr(a, "_metadata", None), getattr(b, "_metadata", None), seen)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, seen)
    elif isinstance(a, float | complex):
        assert repr(a) == repr(b)  # -0.0, nan
    else:
        assert a == b


def memory_of(obj):
    return torch.empty(0, dtype=torch.uint8).set_(obj.untyped_storage())


def plain_objects():
    shared, cycle, inside = [1, 2], [0], []
    cycle.append({"again": cycle})
    inside.append((inside, 1, 2, 3))
    ordered = OrderedDict(b=1, a=[2])
    ordered._metadata = OrderedDict({"": {"version": 1}})
    deep = None
    for _ in range(150):
        deep = [deep, (deep,)]
    return {
        "constants": [None, True, False, (), [], {}],
        "ints": [0, 1, 255, 256, 65_536, -1, 2**31, -(2**31), 2**63, -(2**2100), 10**700],
        "floats": [0.0, -0.0, 1.5, float("inf"), float("nan"), 5e-324, 1j, complex(-0.0, 2)],
        "texts": ["", "é", "\ud800", "x" * 300, "a\nb", b"", b"\xff", bytes(300)],
        "bytearrays": [bytearray(), bytearray(b"ab"), bytearray(300)],
        "large": ["y" * 70_000, b"\xff" * 70_000, bytearray(70_000), list(range(3000))],
        "long text": "w" * 300_000,
        "tuples": [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {"a": {"b": [{"c": (None,)}]}}],
        "shared": [shared, shared, {"x": shared}, "word", "word"],
        "cycle": cycle,
        "tuple in itself": inside,
        "keys": {(1, (2, "x")): 1, frozenset({(1, 2), 3}): 2, None: 3, 1.5: 4, b"k": 5},
        "sets": [set(), {1, "a", None}, frozenset(), frozenset({frozenset({1}), (2,)})],
        "ordered": [ordered, OrderedDict()],
        "of torch": [torch.Size([]), torch.Size([2, 3]), torch.float32, torch.quint8],
        "2000 entries": {f"key{i}": i for i in range(2000)},
        "deep": deep,
    }


def tensors():
    base = torch.arange(24.0).reshape(4, 6)
    waves = torch.arange(6).to(torch.complex64).reshape(2, 3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    return {
        "0-dim": torch.tensor(2.5),
        "empty": [torch.empty(0), torch.empty(0, 5), base[4:], base[:, 6:], base[2:2, 3:]],
        "views": [base, base[1:3, ::2], base.t(), base[3], base.expand(2, 4, 6)],
        "expanded": torch.ones(1).expand(1000, 1000),
        "conj and neg": [waves.conj(), waves.conj().imag, waves._neg_view().t()],
        "grad": [base.clone().requires_grad_(), torch.nn.Parameter(base, requires_grad=False)],
        "state dict": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "1 MiB": torch.rand(512, 512),
        "shared": [base, {"again": base}],
    }


DTYPES = sorted({value for value in vars(torch).values() if type(value) is torch.dtype}, key=str)


@each_way
@pytest.mark.parametrize("what", plain_objects())
def test_plain_objects(what, through):
    obj = plain_objects()[what]
    assert_same(obj, through(obj), {})


@each_way
@pytest.mark.parametrize("what", tensors())
def test_tensors(what, through):
    obj = tensors()[what]
    assert_same(obj, through(obj), {})


# Every dtype that this torch pickles; it pickles none of fewer than 8 bits.
@each_way
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_dtype(through):
    read = 0
    for dtype in DTYPES:
        if str(dtype).startswith("torch.q"):
            continue  # quantized
        memory = torch.arange(48, dtype=torch.uint8).remainder(2).untyped_storage()
        obj = torch.empty(0, dtype=dtype).set_(memory, 1, (2,), (1,))
        try:
            pickle.dumps(obj)
        except KeyError:
            assert re.fullmatch(r"torch\.u?int[1-7]", str(dtype))
            continue
        assert_same(obj, through(obj), {})
        read += 1
    assert read >= 20


# A bytearray that moved would leave the tensor with memory that is not its own.
def test_the_memory_of_a_tensor_stays_in_place():
    held = pickle.BYTEARRAY8 + struct.pack("<Q", 8) + bytes(8) + b"r\xff\0\0\0"
    storage = call(FROM, held, glob("torch.float32"))
    taken, data = loads(whole(tensor(storage=storage), b"h\xff\x86"))
    with pytest.raises(BufferError):
        data.extend(bytes(1000))
    data[3] = 64
    assert taken[0] == 2


@pytest.mark.parametrize("payload", [bytes, bytearray, memoryview])
def test_payloads(payload):
    assert loads(payload(pickle.dumps([1, "a"]))) == [1, "a"]


# --- what is refused


class Colour(enum.Enum):
    RED = 1


Point = namedtuple("Point", "x")


class Sub(dict):
    pass


class Other:
    pass


with_attribute = torch.ones(1)
with_attribute.note = "x"

REFUSED = [
    (datetime.date(2026, 1, 1), "datetime.date"),
    (decimal.Decimal(1), "decimal.Decimal"),
    (Colour.RED, "test_plain_data.Colour"),
    (Point(1), "test_plain_data.Point"),
    (Sub(), "test_plain_data.Sub"),
    (Other(), "test_plain_data.Other"),
    (defaultdict(list), "collections.defaultdict"),
    (Counter("a"), "collections.Counter"),
    (deque(), "collections.deque"),
    (range(3), "builtins.range"),
    (..., "builtins.Ellipsis"),
    (ValueError("x"), "builtins.ValueError"),
    (int, "builtins.int"),
    (set, "builtins.set"),
    ([{"a": OrderedDict}], "collections.OrderedDict"),
    (torch.Size, "torch.Size"),
    (NcclUniqueId, "NcclUniqueId"),
    (print, "builtins.print"),
    (os.system, f"{os.system.__module__}.system"),
    (torch.add, "torch"),
    (torch.device("cpu"), "torch.device"),
    (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    (torch.ones(2, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
    (torch.ones(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
    (with_attribute, "torch._tensor._rebuild_from_type_v2"),
    (torch.ones(2).untyped_storage(), "a storage without a tensor"),
    (pickle.PickleBuffer(b"abc"), ""),
]


@pytest.mark.parametrize(("obj", "name"), REFUSED, ids=[name for _, name in REFUSED])
def test_the_name_and_the_rule_are_told(obj, name):
    for outer in (obj, [1, {"k": obj}]):
        if name:
            refused(pickle.dumps(outer), name)
        buffers = []
        payload = pickle.dumps(outer, 5, buffer_callback=buffers.append)
        refused(payload, "a plain message holds only None", list(map(bytes, buffers)))


def test_numpy_is_refused():
    numpy = pytest.importorskip("numpy")
    for obj in (numpy.ones(2), numpy.float64(1), numpy.dtype("f4")):
        refused(pickle.dumps(obj), "numpy")


def test_a_quantized_tensor_is_refused():
    quantized = call(V3, memory(8), put(0), put((2,)), put((1,)), put(False), HOOKS)
    refused(whole(quantized[:-2], glob("torch.quint8"), b"tR"), "quantized tensor (torch.quint8)")


# --- attacks; each would run something, or end the process, with ``pickle.loads``


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize("protocol", range(6))
def test_os_system(protocol):
    refused(pickle.dumps(Evil(), protocol), f"{os.system.__module__}.system")


ATTACKS = {
    "reduce": (call("canary.run", put(1)), "canary.run"),
    "dotted name": (put("torch") + put("storage.os.system") + b"\x93", "torch.storage.os.system"),
    "getattr": (call("builtins.getattr", glob("torch.Size"), put("mro")), "builtins.getattr"),
    "method": (put("collections") + put("OrderedDict.fromkeys") + b"\x93", "OrderedDict.fromkeys"),
    "import": (call("builtins.__import__", put("canary")), "builtins.__import__"),
    "a module that is not there": (glob("no_such_module.x"), "no_such_module.x"),
    "name that is no str": (b"NN\x93", "STACK_GLOBAL requires str"),
    "escapes in a name": (glob("\x1b[31m.x"), r"\x1b[31m.x"),
    "long name": (glob("x" * 100_000 + ".y"), "xxx..."),
    "new": (glob("canary.Canary") + b")\x81", "canary.Canary"),
    "new of a class of the table": (glob("torch.Size") + b")\x81", "the opcode NEWOBJ"),
    "new with keywords": (glob("torch.Size") + b")}\x92", "the opcode NEWOBJ_EX"),
    "inst": (b"(icanary\nCanary\n", "canary.Canary"),
    "inst of the table": (b"(icollections\nOrderedDict\n", "collections.OrderedDict"),
    "obj": (b"(" + glob("torch.Size") + b"o", "the opcode OBJ"),
    "ext1": (b"\x82\x01", "the opcode EXT1"),
    "ext2": (b"\x83" + struct.pack("<H", 300), "the opcode EXT2"),
    "ext4": (b"\x84" + struct.pack("<i", 70_000), "the opcode EXT4"),
    "persistent id": (b"Pcanary\n", "the opcode PERSID"),
    "binary persistent id": (b"NQ", "the opcode BINPERSID"),
    "dup": (b"N2", "the opcode DUP"),
    "get by text": (b"Ng0\n", "the opcode GET"),
    "no opcode": (b"\xff", "the opcode 255"),
    "read-only buffer": (b"\x96" + bytes(8) + b"\x98", "the opcode READONLY_BUFFER"),
    "build on a list": (b"]" + put({"_metadata": 1}) + b"b", "an item or attribute of list"),
    "build on a tensor": (tensor() + put({"_metadata": 1}) + b"b", "attribute of Tensor"),
    "build hides a method": (HOOKS + put({"keys": 1}) + b"b", "an attribute of OrderedDict"),
    "build, two attributes": (HOOKS + put({"_metadata": 1, "x": 2}) + b"b", "OrderedDict"),
    "build, class": (HOOKS + put({"__class__": 1}) + b"b", "an attribute of OrderedDict"),
    "build, slots": (HOOKS + put((None, {"_metadata": 1})) + b"b", "an attribute of OrderedDict"),
    "build on a function": (glob("torch.Size") + put({"_metadata": 1}) + b"b", "Call"),
    "call of a list": (b"])R", "a call of list"),
    "call of a tensor": (tensor() + b")R", "a call of Tensor"),
    "call with a list": (glob("builtins.set") + b"]R", "a call of Call"),
    "other types": (call("builtins.set", put("abc")), "builtins.set of (str)"),
    "too many arguments": (call("torch.Size", *[put((1,))] * 40), "torch.Size of (tuple, tuple"),
    "bytes of a number": (call("builtins.bytes", put(2**40)), "builtins.bytes of (int)"),
    "bytearray of a number": (call("builtins.bytearray", put(2**40)), "bytearray of (int)"),
    "other encoding": (call("_codecs.encode", put("x"), put("zip")), "the encoding zip"),
    "append to a bytearray": (b"\x96" + bytes(8) + b"K\x01a", "an item or attribute of bytearray"),
    "extend a tensor": (tensor() + b"(K\x01e", "an item or attribute of Tensor"),
    "items of a tensor": (tensor() + b"K\x00K\x01s", "an item or attribute of Tensor"),
    "items of a list": (b"](K\x00K\x01u", "an item or attribute of list"),
    "add to a list": (b"](K\x00\x90", "an item or attribute of list"),
    "odd items": (b"}(K\x00u", "ValueError"),
    "unhashable key": (b"}]Ns", "TypeError: unhashable type"),
    "a function within": (b"]" + glob("_codecs.encode") + b"a", "_codecs.encode"),
    "a function in _metadata": (
        HOOKS + b"}" + put("_metadata") + glob("torch.Size") + b"sb",
        "torch.Size",
    ),
    "a storage within": (b"]" + memory(8) + b"a", "a storage without a tensor"),
    "the class of ids within": (b"]" + glob(".".join(unique_id.VLLM_NAME)) + b"a", "NcclUniqueId"),
    "id with attributes": (
        call(
            "_ctypes._unpickle",
            glob(".".join(unique_id.VLLM_NAME)),
            put(({"internal": 1}, bytes(128))),
        ),
        "an ncclUniqueId with attributes",
    ),
    "id of 5 bytes": (
        call("_ctypes._unpickle", glob(".".join(unique_id.VLLM_NAME)), put(({}, b"12345"))),
        "an id of 5 bytes",
    ),
    "structure of another class": (
        call("_ctypes._unpickle", glob("canary.Canary"), put(({}, b""))),
        "canary.Canary",
    ),
    "no buffer": (b"\x97", "out-of-band"),
    "nothing": (b"", "no pickle of plain data: "),
    "mark that is not there": (b"t", "IndexError"),
    "get of nothing": (b"h\x05", "Memo value not found"),
    "protocol 9": (b"\x80\x09", "unsupported pickle protocol"),
    "bytearray of 2**62": (b"\x96" + struct.pack("<Q", 2**62), "4611686018427387904 bytes"),
    "bytearray of 2**64": (b"\x96" + b"\xff" * 8, "18446744073709551615 bytes"),
    "bytes of 2**62": (b"\x8e" + struct.pack("<Q", 2**62), "no pickle of plain data"),
    "text of 2**62": (b"\x8d" + struct.pack("<Q", 2**62), "no pickle of plain data"),
    "frame of 2**62": (b"\x95" + struct.pack("<Q", 2**62), "no pickle of plain data"),
    "int of -1 bytes": (b"\x8b" + b"\xff" * 4, "negative byte count"),
}


def test_a_storage_has_no_nested_keys():
    """Its header is a dict with a key of tuples, each twice in the next: 2**18 parts to hash."""
    levels = 18
    nested = b"K\x01K\x01\x86q\x000" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) + b"0"
        for i in range(levels)
    )
    header = b"\x80\x02" + nested + b"}h" + bytes([levels]) + b"Ns."
    saved = b"".join(
        [
            pickle.dumps(torch.serialization.MAGIC_NUMBER, 2),
            pickle.dumps(torch.serialization.PROTOCOL_VERSION, 2),
            header,
        ]
    )
    length = len(saved).to_bytes(4, "little")
    message = b"\x80\x04ctorch.storage\n_load_from_bytes\nB" + length + saved + b"\x85R."
    refused(message, "a key with 1 levels of tuples, or with too many parts")


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks(attack):
    payload, text = ATTACKS[attack]
    refused(whole(payload), text)


TENSORS = {
    "end of the storage": {"size": (3,)},
    "beyond by stride": {"stride": (2,)},
    "beyond by offset": {"offset": 1},
    "size of 2**62": {"size": (2**62,), "stride": (0,)},
    "sizes that overflow": {"size": (2**40, 2**40), "stride": (0, 0)},
    "size of 2**62 beside a 0": {"size": (0, 2**62), "stride": (1, 1)},
    "stride that overflows": {"size": (3,), "stride": (2**62,)},
    "empty at 2**62": {"offset": 2**62, "size": (0,)},
    "more strides": {"stride": (1, 1)},
    "fewer strides": {"size": (1, 2)},
    "65 dimensions": {"size": (1,) * 65, "stride": (1,) * 65},
    "room for more": {"size": (2**20,), "storage": call(LOAD, put(saved(torch.UntypedStorage(0))))},
}
COUNTS = {
    "negative stride": {"offset": 1, "stride": (-1,)},
    "negative size": {"size": (-1,)},
    "negative offset": {"offset": -1},
    "size of 2**63": {"size": (2**63,)},
    "size that is a bool": {"size": (True,)},
    "size that is a float": {"size": (2.0,)},
    "size that is a str": {"size": ("2",)},
}


@pytest.mark.parametrize("attack", TENSORS)
def test_tensors_outside_their_storage(attack):
    refused(whole(tensor(**TENSORS[attack])), " tensor of size")


@pytest.mark.parametrize("attack", COUNTS)
def test_numbers_that_are_no_counts(attack):
    refused(whole(tensor(**COUNTS[attack])), "no int from 0 to 2**63 - 1")
    if "size" in attack:
        refused(whole(call("torch.Size", put(COUNTS[attack]["size"]))), "no int from 0")


def test_arguments_of_tensors():
    hooks = HOOKS + put(1) + put(2) + b"s"
    refused(whole(tensor(hooks=hooks)), "a tensor with hooks")
    parameter = call("torch._utils._rebuild_parameter", tensor(), put(True), hooks)
    refused(whole(parameter), "a parameter with hooks")
    refused(whole(tensor(grad=2)), "_rebuild_tensor_v2 of (_Storage, int, tuple, tuple, int")
    refused(whole(tensor(storage=put(b"abc"))), "_rebuild_tensor_v2 of (bytes")
    refused(whole(tensor(grad=True, storage=memory(8, "int32"))), "RuntimeError: only Tensors")
    for flags in ({"conj": True}, {"neg": 1}, {"x": True}, {1: True}, {"neg": True, "x": True}):
        refused(whole(tensor(more=put(flags))), "metadata other than")
    assert loads(whole(tensor(more=put({"neg": True})))).is_neg()


# --- what torch.save wrote for a storage is the second pickle within the first


def storage_bytes(device="cpu", count=2, view=None, keys=("7",), head=HEAD, written=2, length=8):
    persistent = put("storage") + glob("torch.FloatStorage") + put("7") + put(device) + put(count)
    identity = b"\x80\x02(" + persistent + put(view) + b"tQ."
    tail = struct.pack("<q", written) + bytes(length)
    return head + identity + pickle.dumps(list(keys), 2) + tail


STORAGES = {
    "os.system": (HEAD + pickle.dumps(Evil(), 2), "system is not read"),
    "in the magic number": (pickle.dumps(Evil(), 2), "system is not read"),
    "canary": (HEAD + whole(call("canary.run")), "canary.run"),
    "what torch allows": (HEAD + whole(call("torch.Tensor", put(2**40))), "torch.Tensor"),
    "a call of the table": (HEAD + whole(call("builtins.set", b"]")), "builtins.set"),
    "a storage in a storage": (HEAD + whole(call(LOAD, put(b""))), LOAD),
    "a zip": (b"PK\x03\x04" + bytes(100), "the opcode PERSID"),
    "empty": (b"", "no pickle of plain data"),
    "another head": (b"\x80\x02K\x01." * 5, "torch.save did not write"),
    "big-endian": (
        storage_bytes(head=HEAD.replace(b"endianq\x02\x88", b"endianq\x02\x89")),
        "torch.save did not write",
    ),
    "other key": (storage_bytes(keys=("8",)), "torch.save did not write"),
    "two keys": (storage_bytes(keys=("7", "7")), "torch.save did not write"),
    "a view": (storage_bytes(view=("8", 0, 2)), "torch.save did not write"),
    "2**40 elements": (storage_bytes(count=2**40), "a storage of 2 elements"),
    "-1 elements": (storage_bytes(count=-1, written=-1, length=0), "elements in 0 bytes"),
    "short": (storage_bytes(length=7), "2 elements in 7 bytes"),
    "long": (storage_bytes(length=9), "2 elements in 9 bytes"),
    "no end": (storage_bytes()[:-15], "a storage of 2 elements in 0 bytes"),
}


@pytest.mark.parametrize("attack", STORAGES)
def test_storages(attack):
    data, text = STORAGES[attack]
    refused(whole(tensor(storage=call(LOAD, put(data)))), text)


def test_the_storage_by_hand_is_what_torch_writes():
    assert loads(whole(tensor(storage=call(LOAD, put(storage_bytes()))))).tolist() == [0, 0]


# What a process allows torch's own unpickler is not allowed in messages.
def test_safe_globals_of_torch_do_not_count():
    with torch.serialization.safe_globals([Canary]):
        data = HEAD + whole(glob("canary.Canary"), b")\x81")
        refused(whole(call(LOAD, put(data))), "canary.Canary")


# The memory of a CUDA tensor comes from its bytes, and becomes a CPU tensor.
def test_a_tensor_of_another_device_arrives_on_the_cpu():
    data = storage_bytes(device="cuda:0")
    read = loads(whole(tensor(storage=call(LOAD, put(data)))))
    assert read.device.type == "cpu" and read.tolist() == [0, 0]


# --- bombs: each would end the process, fill the memory or never end; a process apart reads them


def bombs():
    nested = b")" + b"\x85" * 200_000  # its hash overflows the stack of C
    doubled = b")" + b"q\x00h\x00\x86" * 100  # its hash takes 2**100 steps
    wide = b")" + (b"q\x000(" + b"h\x00" * 1000 + b"t") * 5  # 1000**5 parts
    for key in (nested, doubled, wide):
        yield whole(b"}", key, b"Ns")
        yield whole(b"}(", key, b"Nu")
        yield whole(b"\x8f(", key, b"\x90")
        yield whole(b"(", key, b"\x91")
        yield whole(call("builtins.set", b"](", key, b"e"))
        yield whole(call("builtins.frozenset", b"](", key, b"e"))
        yield whole(call(LOAD, put(HEAD + whole(b"}", key, b"Ns"))))
    # to compare one such frozenset with a copy takes 2**60 steps
    first = b"(K\x01\x91q\x000(K\x02\x91q\x010"
    yield whole(first, (b"(h\x00h\x01\x91(h\x00h\x01K\x00\x91" + b"q\x010q\x000") * 60, b"h\x00")
    megabyte = {
        "builtins.bytearray": put(bytes(10**6)),
        "_codecs.encode": put("x" * 10**6) + put("latin1"),
        "builtins.set": put(list(range(10**5))),
        "builtins.frozenset": put(list(range(10**5))),
        "torch.Size": put((1,) * 10**5),
        LOAD: put(saved(torch.UntypedStorage(10**6))),
    }
    for name, args in megabyte.items():  # copied 100,000 times
        once = glob(name) + b"q\xf0(" + args + b"tq\xf1"
        yield whole(once, b"(" + b"h\xf0h\xf1R" * 100_000 + b"t")


def harmless():
    """Messages that look like bombs, and are plain data."""
    many = 150_000
    yield whole(b"Nr" + b"\xff" * 4)
    yield whole(b"]" * many, b"a" * (many - 1))
    yield whole(b")", b"\x85" * many)
    yield whole(HOOKS * many, b"0" * (many - 1))
    yield whole(b"]", b"q\x00](h\x00h\x00e" * many)
    yield whole(b"(" * many, b"t" * many)


def read_bombs():
    limit_memory()
    bounds = Counter()
    for payload in bombs():
        with pytest.raises(MessageError, match=r"a key with|a message that grows"):
            loads(payload)
        bounds["refused"] += 1
    for payload in harmless():
        loads(payload)
        bounds["read"] += 1
    return bounds


def limit_memory():
    """From here on, this process gets 1 GiB more, where the system can tell how much it has."""
    if sys.platform != "linux":
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


# --- fuzzing: hostile pickles in a process whose audit hook knows what honest ones do

NAMES = (
    "canary.run canary.Canary canary.instance os.system posix.system nt.system os.execv "
    "subprocess.Popen subprocess.check_output builtins.eval builtins.exec builtins.compile "
    "builtins.open builtins.getattr builtins.setattr builtins.__import__ builtins.print "
    "builtins.type builtins.object builtins.map builtins.input __builtin__.apply "
    "importlib.import_module runpy.run_path pickle.loads _pickle.loads marshal.loads "
    "shutil.rmtree functools.partial functools.reduce operator.attrgetter "
    "operator.methodcaller operator.call types.FunctionType types.CodeType ctypes.CDLL "
    "ctypes.memset _ctypes.dlopen socket.socket socket.create_connection sys.exit "
    "sys.setrecursionlimit os._exit signal.raise_signal copyreg._reconstructor "
    "copyreg.__newobj__ collections.Counter collections.defaultdict code.interact pty.spawn "
    "threading.Thread webbrowser.open torch.load torch.save torch.Tensor torch.hub.load "
    "torch.empty torch.ones torch.from_file torch.device torch.storage.TypedStorage "
    "torch.storage.UntypedStorage torch.FloatStorage torch._utils._rebuild_tensor "
    "torch._utils._rebuild_sparse_tensor torch._utils._rebuild_qtensor "
    "torch._utils._rebuild_nested_tensor torch._utils._rebuild_wrapper_subclass "
    "torch._utils._rebuild_meta_tensor_no_storage torch._tensor._rebuild_from_type_v2 "
    "torch._utils._rebuild_device_tensor_from_numpy torch.nn.parameter.Parameter "
    "torch._utils._rebuild_parameter_with_state torch.nn.modules.linear.Linear "
    "torch.ops.load_library torch.classes.load_library torch.utils.cpp_extension.load "
    "torch._dynamo.config numpy.core.multiarray._reconstruct numpy.load no_such_module.x"
)
DANGEROUS = NAMES.split()
ALLOWED = sorted(".".join(name) for name in plain_data.Reader.names)


class Program:
    """Random pickles that are well formed, over names that are allowed and names that are not."""

    def __init__(self, chance):
        self.chance = chance
        self.left = chance.randint(3, 30)  # expressions, so that a program ends
        self.makers = [self.atom, self.atom, self.container, self.container, self.call, self.call]
        self.makers += [self.memo, self.tensor, self.hostile]

    def any(self):
        self.left -= 1
        return self.atom() if self.left < 0 else self.chance.choice(self.makers)()

    def some(self, most=4):
        return b"".join(self.any() for _ in range(self.chance.randint(0, most)))

    def number(self):
        near = [0, 0, 1, 1, 2, 3, 4, 7, 8, 16, -1, 2**31, 2**40, 2**62, 2**63, -(2**63), True, 1.5]
        return self.chance.choice(near)

    def atom(self):
        chance = self.chance
        values = [None, True, self.number(), self.number(), "x", "latin1", b"ab", "_metadata"]
        return put(chance.choice([*values, chance.randbytes(4), "conj", "neg", (), "storage"]))

    def container(self):
        pairs = b"".join(self.atom() + self.any() for _ in range(self.chance.randint(0, 3)))
        kinds = [b"](%be", b"(%bt", b"\x8f(%b\x90", b"(%b\x91"]
        some = b"" if pairs else self.some()
        return b"}(%bu" % pairs if pairs else self.chance.choice(kinds) % some

    def memo(self):
        index = bytes([self.chance.randrange(4)])
        puts = [b"q" + index, b"\x94", b"r" + self.chance.randbytes(4)]
        return b"h" + index if self.chance.random() < 0.4 else self.any() + self.chance.choice(puts)

    def tensor(self):
        """A tensor with at most one argument that is out of the ordinary."""
        chance = self.chance
        odd = {
            "offset": chance.choice([0, 1, 8, -1, 2**62]),
            "size": tuple(self.number() for _ in range(chance.randint(0, 3))),
            "stride": tuple(self.number() for _ in range(chance.randint(0, 3))),
            "grad": chance.choice([True, 1, None]),
            "hooks": self.of(OrderedDict),
            "more": self.of(dict),
            "storage": self.storage(),
        }
        name = chance.choice(list(odd))
        made = tensor(**{"size": (1,), name: odd[name]})
        if chance.random() < 0.2:
            return call("torch._utils._rebuild_parameter", made, put(False), HOOKS)
        return made

    def call(self):
        chance = self.chance
        name = chance.choice(ALLOWED if chance.random() < 0.9 else DANGEROUS)
        found = plain_data.Reader.names.get(tuple(name.rpartition(".")[::2]))
        if not isinstance(found, plain_data.Call) or chance.random() < 0.1:
            return glob(name) + b"(" + self.some() + b"tR"
        kinds = chance.choice(sorted(found.signatures, key=len))
        wrong = chance.random() < 0.1
        return call(name, *(self.any() if wrong else self.of(kind) for kind in kinds))

    def of(self, kind):
        """An argument of a type that a function of the table takes."""
        chance = self.chance
        if kind in (int, bool, float):
            return put(kind(max(-1, min(self.number(), 2**63))))
        if kind is tuple:
            numbers = tuple(chance.choice([0, 1, 1, 2, 3]) for _ in range(chance.randint(0, 3)))
            some = [put(numbers), put(numbers), put((self.number(),)), b"(" + self.some() + b"t"]
            return chance.choice([*some, put(({}, bytes(128)))])
        if kind is dict:
            return put({chance.choice(["conj", "neg", "x"]): chance.choice([True, False, 1])})
        if kind is OrderedDict:
            return HOOKS if chance.random() < 0.9 else HOOKS + self.atom() + self.any() + b"s"
        if kind is bytearray:
            return b"\x96" + struct.pack("<Q", 16) + bytes(16)
        if kind is bytes:
            data = bytearray(saved(torch.UntypedStorage(chance.choice([0, 1, 16]))))
            return put(bytes(mutated(chance, data) if chance.random() < 0.3 else data))
        if kind is torch.Tensor:
            return self.call() if chance.random() < 0.1 else self.tensor()
        if kind is torch.dtype:
            return glob(str(chance.choice(DTYPES)))
        if kind is list:
            return b"](" + self.some() + b"e"
        if kind is str:
            return put(chance.choice(["abc", "latin1", "latin1", "utf-8"]))
        if kind is type(NcclUniqueId):
            return glob(".".join(unique_id.VLLM_NAME))
        return self.storage()

    def storage(self):
        name = self.chance.choice([FROM, LOAD])
        (kinds,) = plain_data.Reader.names[tuple(name.rpartition(".")[::2])].signatures
        return call(name, *map(self.of, kinds))

    def hostile(self):
        chance = self.chance
        name = chance.choice(DANGEROUS)
        module, _, attribute = name.rpartition(".")
        code = chance.choice([b"\x82\x01", b"\x83\x2c\x01", b"\x84\x70\x11\x01\x00"])
        forms = [
            lambda: call(name, self.any()),
            lambda: put(module) + put(attribute) + b"\x93" + b"(" + self.some() + b"tR",
            lambda: glob(name) + b"(" + self.some() + b"t\x81",
            lambda: glob(name) + b")}\x92",
            lambda: b"(" + self.some() + f"i{module}\n{attribute}\n".encode(),
            lambda: b"(" + glob(name) + self.some() + b"o",
            lambda: code + b"(" + self.some() + b"tR",
            lambda: self.any() + self.any() + b"b",
            lambda: self.any() + b"Q",
            lambda: b"Pcanary\n",
            lambda: self.any() + self.any() + b"a",
            lambda: self.any() + self.any() + self.any() + b"s",
            lambda: self.any() + b"(" + self.some() + chance.choice([b"e", b"u", b"\x90"]),
            lambda: self.any() + b"(" + self.some() + b"tR",
            lambda: self.any() + b"2",
            lambda: chance.randbytes(chance.randint(1, 4)),
        ]
        return chance.choice(forms)()


def mutated(chance, data):
    """With a few bytes changed, moved, doubled or lost."""
    for _ in range(chance.choice([1, 1, 2, 3, 8])):
        at, length = chance.randrange(len(data) + 1), chance.choice([1, 1, 2, 4, 16, 64])
        how = chance.randrange(5)
        if how == 0 and at < len(data):
            data[at] = chance.choice([chance.randrange(256), data[at] ^ 1 << chance.randrange(8)])
        elif how == 1:
            del data[at : at + length]
        elif how == 2:
            data[at:at] = data[chance.randrange(len(data) + 1) :][:length]
        elif how == 3:
            data[at:at] = chance.choice([chance.randbytes(length), b"\xff" * 8, bytes(4)])
        else:
            data[at : at + 8] = struct.pack("<Q", chance.choice([1 << 31, 1 << 40, 1 << 62, 0]))
    return data


def honest():
    """Pickles of both formats, their buffers, and where their opcodes begin."""
    found = []
    objects = [obj for name, obj in plain_objects().items() if name not in ("large", "long text")]
    objects += [obj for name, obj in tensors().items() if name not in ("1 MiB", "parameters")]
    objects += [torch.ones(3).to(dtype) for dtype in (torch.float8_e5m2, torch.uint16)]
    objects += [NcclUniqueId(), [torch.ones(20_000), {"step": 3}]]
    for obj in objects:
        payloads = [(pickle.dumps(obj, protocol), None) for protocol in (2, 3, 4, 5)]
        encoded = encode(obj)
        first, *rest = encoded.parts or [encoded.value[1:]]
        for payload, buffers in [*payloads, (bytes(first), list(map(bytearray, rest)))]:
            if len(payload) < 20_000:
                starts = [position for *_, position in pickletools.genops(payload)]
                found.append((payload, buffers, starts))
    vllm = pickled_for_vllm(NcclUniqueId())
    return [*found, (vllm, None, [position for *_, position in pickletools.genops(vllm)])]


def from_honest(chance, seeds):
    """A mutation of an honest pickle, or one spliced with another or with a hostile piece."""
    payload, buffers, starts = chance.choice(seeds)
    how, cut = chance.randrange(4), chance.choice(starts)
    if how == 0:
        payload = bytes(mutated(chance, bytearray(payload)))
    elif how == 1:
        other, _, others = chance.choice(seeds)
        payload = payload[:cut] + other[chance.choice(others) :]
    elif how == 2:
        program = Program(chance)
        payload = payload[:cut] + program.hostile() + payload[cut:]
    else:
        names = [name.encode() for name in DANGEROUS]
        found = re.findall(rb"c([\w.]+\n\w+)\n", payload)
        if found:
            hostile = chance.choice(names).replace(b".", b"\n", 1)
            payload = payload.replace(chance.choice(found), hostile, 1)
        else:
            payload = payload[:cut] + bytes(mutated(chance, bytearray(payload[cut:])))
    return payload, buffers


def from_program(chance, _):
    """A random program, which may be mutated."""
    payload = whole(Program(chance).any())
    if chance.random() < 0.2:
        payload = bytes(mutated(chance, bytearray(payload)))
    return payload, [bytearray(8)] if chance.random() < 0.3 else None


PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype)


def assert_plain(result, counts):
    """No other types in what came out; tensors lie inside their memory, which can be read."""
    left, seen = [result], set()
    while left:
        obj = left.pop()
        if id(obj) in seen or type(obj) in PLAIN:
            continue
        seen.add(id(obj))
        if type(obj) in (list, tuple, set, frozenset):
            left += obj
        elif type(obj) in (dict, OrderedDict):
            left += [*obj, *obj.values(), *getattr(obj, "__dict__", {}).values()]
            assert set(getattr(obj, "__dict__", {})) <= {"_metadata"}
        elif type(obj) in (torch.Tensor, torch.nn.Parameter):
            counts["tensors"] += 1
            assert_inside(obj)
        else:
            assert type(obj) is NcclUniqueId, type(obj)


def assert_inside(obj):
    assert obj.device.type == "cpu" and obj.layout is torch.strided and not obj.is_quantized
    assert not obj._backward_hooks and not vars(obj).keys() - {"_backward_hooks"}
    last = sum((n - 1) * step for n, step in zip(obj.shape, obj.stride(), strict=True))
    end = obj.storage_offset() + (last + 1 if obj.numel() else 0)
    assert end * obj.itemsize <= obj.untyped_storage().nbytes() < 2**20
    if obj.numel() < 2**16 and str(obj.dtype) not in NOT_COPIED:
        obj.detach().clone()


NOT_COPIED = {f"torch.{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}
WAYS = {"honest": from_honest, "program": from_program}
EVENTS = {"builtins.id", "ctypes.cdata/buffer", "ctypes.string_at", "ctypes.addressof"}


class Watch:
    """An audit hook. It learns what honest pickles do, and then lets nothing else be done."""

    def __init__(self):
        self.known, self.unknown, self.on, self.learning = set(), [], False, True
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if not self.on:
            return
        if self.learning:
            self.known.add(event)
        elif event not in self.known:
            self.on = False
            self.unknown.append(f"{event} {args!r:.200}")
            raise RuntimeError(f"not allowed: {event}")

    def loads(self, payload, buffers):
        self.on = True
        try:
            return loads(payload, buffers)
        finally:
            self.on = False


def fuzz(way, inputs, seed, case):
    """Read hostile pickles; the file ``case`` holds the number of the current one."""
    warnings.simplefilter("ignore")
    counts, seeds, watch = Counter(), honest(), Watch()
    for payload, buffers, _ in seeds:
        assert_plain(watch.loads(payload, buffers), counts)
    assert watch.known <= EVENTS, watch.known
    watch.learning = False
    counts.clear()
    limit_memory()
    for number in range(inputs):
        if number % 1000 == 0:
            faulthandler.dump_traceback_later(60, exit=True)  # one that does not end
        os.pwrite(case.fileno(), b"%-20d" % number, 0)
        payload, buffers = WAYS[way](random.Random(f"{seed}/{way}/{number}"), seeds)
        counts["inputs"] += 1
        try:
            result = watch.loads(payload, buffers)
        except MessageError as error:
            counts["names refused"] += "a plain message holds" in str(error)
        else:
            counts["read"] += 1
            assert_plain(result, counts)
        assert not watch.unknown and not CALLED, (payload, watch.unknown, CALLED)
    return counts


def in_a_process(*arguments, deadline=100):
    """Run this file, and return the counts that it prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return json.loads(done.stdout)


def test_bombs():
    assert in_a_process("--bombs") == {"refused": 28, "read": 6}


@pytest.mark.parametrize("way", WAYS)
def test_hostile_pickles(way):
    counts = in_a_process("--way", way, "--inputs", 5_000, "--seed", 1)
    assert counts["inputs"] == 5_000
    assert counts["read"] > 250 and counts["tensors"] > 100 and counts["names refused"] > 1500


# --- the ids of vLLM


def test_an_id():
    data = bytes(range(128))
    made = NcclUniqueId.from_bytes(data)
    assert bytes(made) == bytes(made.internal) == data
    assert ctypes.sizeof(made) == 128 and bytes(NcclUniqueId()) == bytes(128)
    assert repr(made) == "<NcclUniqueId 0001020304050607...>"
    for size in (0, 127, 129):
        with pytest.raises(ValueError, match=f"an id of {size} bytes: NCCL's have 128"):
            NcclUniqueId.from_bytes(bytes(size))
    with pytest.raises(ValueError, match="an id of 3 bytes"):
        pickled_for_vllm(b"abc")


def by_unpickler(payload):
    return unique_id.Unpickler(io.BytesIO(payload)).load()


each_reader = pytest.mark.parametrize("read", [loads, by_unpickler])

PEER = """
import ctypes, pickle, sys, types
class ncclUniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 128)]
name = "vllm.distributed.device_communicators.pynccl_wrapper"
module = sys.modules[name] = types.ModuleType(name)
for parent in ("vllm", "vllm.distributed", "vllm.distributed.device_communicators"):
    sys.modules[parent] = types.ModuleType(parent)
module.ncclUniqueId, ncclUniqueId.__module__ = ncclUniqueId, name
read = pickle.loads(bytes.fromhex(sys.argv[1]))
assert type(read) is ncclUniqueId and vars(read) == {}
for protocol in range(2, 6):
    print(pickle.dumps([bytes(read), read], protocol).hex())
"""


# A process with a class of vLLM's name reads ours, and its own is read here, without the class.
@each_reader
def test_ids_to_and_from_vllm(read):
    data = random.Random(1).randbytes(128)
    payload = pickled_for_vllm(NcclUniqueId.from_bytes(data))
    command = [sys.executable, "-c", PEER, payload.hex()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.split()
    assert len(lines) == 4
    for line in lines:
        told, made = read(bytes.fromhex(line))
        assert type(made) is NcclUniqueId and bytes(made) == told == data
    assert "vllm" not in sys.modules
    assert bytes(read(payload)) == bytes(read(pickle.dumps(read(payload)))) == data


# vLLM's wrapper takes its own class only, so a process that has imported it gets that.
@each_reader
def test_ids_where_vllm_is_imported(read, monkeypatch):
    class Own(ctypes.Structure):
        _fields_ = (("internal", ctypes.c_byte * 128),)

    module, name = unique_id.VLLM_NAME
    wrapper = types.ModuleType(module)
    setattr(wrapper, name, Own)
    monkeypatch.setitem(sys.modules, module, wrapper)
    assert type(read(pickled_for_vllm(Own()))) is Own
    setattr(wrapper, name, print)
    assert type(read(pickled_for_vllm(Own()))) is NcclUniqueId


def test_the_unpickler_is_pickle_otherwise():
    assert by_unpickler(pickle.dumps(datetime.date(2026, 1, 1))) == datetime.date(2026, 1, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--way", choices=WAYS, action="append")
    parser.add_argument("--bombs", action="store_true")
    options = parser.parse_args()
    counts = Counter()
    with tempfile.TemporaryFile() as case:
        try:
            if options.bombs:
                counts = read_bombs()
            else:
                for way in options.way or WAYS:
                    counts += fuzz(way, options.inputs, options.seed, case)
        except BaseException:
            print(f"seed {options.seed}, case {os.pread(case.fileno(), 20, 0)}", file=sys.stderr)
            raise
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
