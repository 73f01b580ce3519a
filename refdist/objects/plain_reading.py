"""The unpickler of plain data: which opcodes it knows, and what each may do.

Names stand for what a table says, and a call is one of the table's. ``plain_data`` has the table.
"""

import functools
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

_RULE = (
    "a plain message holds only None, bool, int, float, complex, str, bytes, bytearray, list, "
    "tuple, dict, OrderedDict, set, frozenset, and CPU tensors (without attributes of their own), "
    'sizes and dtypes of torch; messages="pickle" reads anything, and runs what a message names'
)
_KEY_LEVELS = 100  # the hash of nested tuples is computed by recursion in C
_KEY_PARTS = 1 << 20  # of all keys; a part that is shared counts again, as it is hashed again
_NESTED = (tuple, frozenset, torch.Size)


_Base: Any = pickle._Unpickler  # not pickle.Unpickler, whose handlers cannot be replaced


class Reader(_Base):  # type: ignore[misc]
    """Reads one pickle from a file of ``size`` bytes."""

    names: ClassVar[dict[tuple[str, str], Any]]  # what a message may name
    dispatch: ClassVar[dict[int, Callable[..., Any]]]  # by opcode

    def __init__(
        self, file: BytesIO, size: int, buffers: Iterable[bytearray] | None = None
    ) -> None:
        super().__init__(file, buffers=buffers)
        self.named = False  # whether a name was looked up
        # calls make no more than the message holds; twice that, as protocol 2 converts bytes first
        self.room = 2 * size
        self.parts = _KEY_PARTS + 16 * size

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up in the table. Nothing is imported."""
        self.named = True
        if (module, name) not in self.names:
            refuse(f"{module}.{name}")
        return self.names[module, name]

    def top(self, *kinds: type) -> Any:
        """The last object. It must be of one of these types: a message changes no others."""
        if type(self.stack[-1]) not in kinds:
            refuse(f"an item or attribute of {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def check_keys(self, keys: list[Any]) -> None:
        """Refuse keys whose hashes take for ever or end the process: shared parts, deep ones."""
        level, levels = [key for key in keys if type(key) in _NESTED], 0
        while level:
            self.parts -= sum(map(len, level))
            levels += 1
            if self.parts < 0 or levels > _KEY_LEVELS:
                refuse(f"a key with {levels} levels of tuples, or with too many parts,")
            level = [part for whole in level for part in whole if type(part) in _NESTED]

    def take(self, size: int) -> None:
        """Count what a call makes: a message may make the same call many times."""
        self.room -= size
        if self.room < 0:
            refuse("a message that grows")

    def load_bytearray8(self) -> None:
        """As pickle's, which makes room for any number of bytes before it reads them."""
        (size,) = struct.unpack("<Q", self.read(8))
        data = bytearray(self.read(min(size, sys.maxsize)))
        if len(data) < size:
            raise EOFError(f"{size} bytes are announced, {len(data)} follow")
        self.append(data)

    def load_append(self) -> None:
        """As pickle's, for a list alone. The next four know their own types."""
        item = self.stack.pop()
        self.top(list).append(item)

    def load_appends(self) -> None:
        """See ``load_append``."""
        items = self.pop_mark()
        self.top(list).extend(items)

    def load_setitem(self) -> None:
        """See ``load_append``."""
        value, key = self.stack.pop(), self.stack.pop()
        self.check_keys([key])
        self.top(dict, OrderedDict)[key] = value

    def load_setitems(self) -> None:
        """See ``load_append``."""
        items = self.pop_mark()
        keys, values = items[::2], items[1::2]
        self.check_keys(keys)
        self.top(dict, OrderedDict).update(zip(keys, values, strict=True))

    def load_additems(self) -> None:
        """See ``load_append``."""
        items = self.pop_mark()
        self.check_keys(items)
        self.top(set).update(items)

    def load_frozenset(self) -> None:
        """As pickle's, with a look at what is hashed."""
        items = self.pop_mark()
        self.check_keys(items)
        self.append(frozenset(items))

    def load_build(self) -> None:
        """As pickle's, for the one attribute that torch gives a dict."""
        state = self.stack.pop()
        # torch's state dicts have this attribute; another might hide a method
        if type(state) is not dict or list(state) != ["_metadata"]:
            refuse(f"an attribute of {type(self.stack[-1]).__name__}")
        vars(self.top(OrderedDict)).update(state)

    def load_reduce(self) -> None:
        """Call a function of the table, with arguments of types that it lists."""
        args, call = self.stack.pop(), self.stack.pop()
        if type(call) is not Call or type(args) is not tuple:
            refuse(f"a call of {type(call).__name__}")
        if tuple(map(type, args)) not in call.signatures:
            refuse(f"{call.name} of ({', '.join(type(arg).__name__ for arg in args[:9])})")
        self.append(call.make(self, *args))

    def refuse_opcode(self, code: int) -> NoReturn:
        """The handler of every other opcode."""
        if code == pickle.INST[0]:
            refuse(b".".join(self.readline().strip() for _ in range(2)).decode(errors="replace"))
        opcodes = [name for name in pickle.__all__ if vars(pickle)[name] == bytes([code])]
        refuse(f"the opcode {' '.join(opcodes) or code}")


_AS_PICKLE = (
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 "
    "BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 "
    "NEXT_BUFFER EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET "
    "BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL"
)
_CHECKED = "BYTEARRAY8 APPEND APPENDS SETITEM SETITEMS ADDITEMS FROZENSET BUILD REDUCE"
Reader.dispatch = {
    **{code: functools.partial(Reader.refuse_opcode, code=code) for code in range(256)},
    **{code: _Base.dispatch[code] for (code,) in map(vars(pickle).__getitem__, _AS_PICKLE.split())},
    **{vars(pickle)[op][0]: getattr(Reader, f"load_{op.lower()}") for op in _CHECKED.split()},
}


@dataclass(frozen=True)
class Call:
    """A function that a message may call; ``make`` gets the reader and the arguments."""

    name: str
    make: Callable[..., Any]
    signatures: frozenset[tuple[type, ...]]


def refuse(what: str) -> NoReturn:
    """Raise the MessageError that names what is not read, and says what is."""
    shown = what if what.isprintable() else ascii(what)
    shown = shown if len(shown) <= 300 else f"{shown[:300]}..."
    raise MessageError(f"{shown} is not read: {_RULE}")
