"""Seals: tags on values in a store, by which ranks that share a secret know their own.

A tag is the HMAC-SHA256 (RFC 2104) of a key of the store and of the value under it. The key of the
HMAC comes from the secret and from random tokens of all ranks, which make one group unlike all
others. So no process without the secret can make a tag; and a tag that was copied from another key
or another group is wrong. A reader checks the tag in constant time before it uses anything in the
value: a wrong value is neither unpickled nor parsed, and no memory is set aside for it. Only the
roll of a barrier, where many ranks sign, is cut at the lengths in it to find the tags.

Limits of tags
    Values are not encrypted: a process that can reach the store can read them all. It can also
    delete keys, overwrite them, fill the memory of rank 0, or connect and never speak. The store
    adds to counts itself, so these carry no tag, and nor do marks such as ``gone``, which say no
    more than that they are there. A stranger that changes them can make a barrier or a call fail,
    in time. It cannot make one pass early: a rank goes by the tags of all ranks on the roll.
"""

import hashlib
import hmac
import ipaddress
import os
import socket
import struct
import warnings

from refdist.errors import UNTRUSTED, AuthenticationError, InsecureGroupWarning

TAG_BYTES = 32
VARIABLE = "REFDIST_SECRET"
SHORTEST = 16
"""Bytes of a secret that is not warned of. One tag lets anybody try secrets, some 1e5 a second."""

_MARK = b"\x06"  # begins a sealed value, and no other
_BLOCK_BYTES = 64
_INNER_PAD, _OUTER_PAD = (bytes(byte ^ pad for byte in range(256)) for pad in (0x36, 0x5C))
_LENGTH = struct.Struct("<I")


class NoSeals:
    """The seals of a group without a secret, which do nothing."""

    tag_bytes = 0

    def below(self, name: str) -> "NoSeals":
        """The seals of a part of the group."""
        return self

    def tag(self, key: str, payload: bytes) -> bytes:
        """No tag."""
        return b""

    def fits(self, tag: bytes, key: str, payload: bytes) -> bool:
        """True."""
        return True

    def seal(self, key: str, payload: bytes) -> bytes:
        """The payload."""
        return payload

    def unseal(self, key: str, value: bytes) -> bytes:
        """The value."""
        return value

    def unseal_outcome(self, key: str, value: bytes) -> bytes:
        """The outcome of a barrier. In place of a forged one, UNTRUSTED and why."""
        try:
            return self.unseal(key, value)
        except AuthenticationError as error:
            return UNTRUSTED + str(error).encode()


NO_SEALS = NoSeals()


class Seals(NoSeals):
    """The seals of one group, or of another purpose.

    Args:
        secret: at least one byte.
        purpose: what the seals are for. Those of one purpose are wrong for another.
        context: the same for all who are to know these seals; and unlike what it was before.
    """

    tag_bytes = TAG_BYTES

    def __init__(self, secret: bytes, purpose: str, *context: bytes) -> None:
        own_key = hmac.digest(secret, _framed(purpose.encode(), *context), "sha256")
        # an HMAC is a hash of a hash (RFC 2104), and both begin with the key: a block that is
        # hashed once here, and not for each tag. The hmac module takes twice as long for a tag.
        block = own_key.ljust(_BLOCK_BYTES, b"\0")
        self._own_key = Secret(own_key)
        self._inner = hashlib.sha256(block.translate(_INNER_PAD))
        self._outer = hashlib.sha256(block.translate(_OUTER_PAD))

    def below(self, name: str) -> "Seals":
        """Seals that are unlike those of this group, and of other parts of it."""
        # no value is under the key "part", so no tag in the store is the key of a part
        return Seals(self._own_key, "part", name.encode())

    def tag(self, key: str, payload: bytes) -> bytes:
        """The tag of a payload under a key of the store."""
        name = key.encode()
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(_LENGTH.pack(len(name)) + name)
        inner.update(payload)
        outer.update(inner.digest())
        return outer.digest()

    def fits(self, tag: bytes, key: str, payload: bytes) -> bool:
        """Whether this is the tag of a payload under a key of the store."""
        return hmac.compare_digest(tag, self.tag(key, payload))

    def seal(self, key: str, payload: bytes) -> bytes:
        """The value to write under a key: a mark, the tag, and the payload."""
        return b"".join((_MARK, self.tag(key, payload), payload))

    def unseal(self, key: str, value: bytes) -> bytes:
        """The payload of the value under a key.

        Raises:
            AuthenticationError: no rank of this group wrote it there.
        """
        if not is_sealed(value):
            raise AuthenticationError(
                f"{key}: holds {len(value)} bytes without a tag, from someone who has no secret; "
                f"they were not looked at"
            )
        start = len(_MARK) + TAG_BYTES
        if len(value) < start:
            raise AuthenticationError(f"{key}: is cut off in its tag, after {len(value)} bytes")
        payload = value[start:]
        if not self.fits(value[len(_MARK) : start], key, payload):
            raise AuthenticationError(
                f"{key}: holds {len(value)} bytes whose tag is wrong: forged, altered or cut off, "
                f"or copied from another key or another group; they were not looked at"
            )
        return payload


def is_sealed(value: bytes) -> bool:
    """Whether a value says that it carries a tag, right or wrong."""
    return value.startswith(_MARK)


class Secret(bytes):
    """A secret that does not show in a traceback with the values of variables."""

    def __repr__(self) -> str:
        return "Secret(...)"


def secret_from(given: bytes | str | None, wire: str | None = None) -> Secret | None:
    """The secret that a user gave, or for None that of the environment, if there is one.

    vLLM's protocol has no tags: for it, the environment does not matter.

    Warns (InsecureGroupWarning) of one that is shorter than ``SHORTEST``, without showing it.

    Raises:
        ValueError: it is empty, or neither bytes nor text. The error does not show it.
    """
    name = "secret"
    if wire is not None:
        if given is not None:
            raise ValueError(f"secret: cannot be used with wire={wire!r}, which has no tags")
        if VARIABLE in os.environ:
            warnings.warn(
                f"{VARIABLE} does not protect this group: vLLM's protocol has no tags",
                InsecureGroupWarning,
                stacklevel=3,
            )
        return None
    if given is None:
        name, given = VARIABLE, os.environ.get(VARIABLE)
        if given is None:
            return None
    if not isinstance(given, bytes | str):
        raise ValueError(f"{name}: must be bytes or str, not {type(given).__name__}")
    if not given:
        raise ValueError(f"{name}={given!r}: must not be empty; give none to do without")
    secret = given.encode() if isinstance(given, str) else given
    if len(secret) < SHORTEST and not isinstance(given, Secret):
        warnings.warn(
            f"{name}: is shorter than {SHORTEST} bytes, so a reader of one value of the store may "
            f"find it by trying; use a long random text such as secrets.token_hex()",
            InsecureGroupWarning,
            stacklevel=3,
        )
    return Secret(secret)


def warn_without_secret(listener: socket.socket, messages: str, wire: str | None) -> None:
    """Warn that a store listens without a secret, unless on a loopback address."""
    address = listener.getsockname()[0]
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return
    danger = ", which are pickles, and so run code on every rank" if messages == "pickle" else ""
    advice = (
        f"Give all ranks the same secret=, or set {VARIABLE}, to a long random text such as "
        f"secrets.token_hex()"
    )
    if wire is not None:
        advice = "vLLM's protocol has no tags, so let a firewall keep strangers out"
    warnings.warn(
        f"the store listens on {address} without a secret: whoever can reach it there can forge "
        f"messages{danger}. {advice}",
        InsecureGroupWarning,
        stacklevel=4,
    )


def _framed(*parts: bytes) -> bytes:
    """Parts in a row, each after its length, so that no other parts look the same."""
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)
