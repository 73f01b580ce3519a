"""Weights of a model, from a trainer to inference engines, by any communicator that broadcasts.

The simple way is a broadcast for each tensor, in an order that all ranks know. It works, but a
model has hundreds of small tensors, and each broadcast has a cost that does not depend on its size.
So vLLM packs: the bytes of the tensors, one after the other, until there are more than the buffer
size, make one broadcast. These functions do either. They speak vLLM's format, so that any rank may
be vLLM's own code.

On all ranks, over a group that both sides have::

    # the trainer, rank 0
    metas = agree(describe(model.state_dict()), group, src=0)
    send_weights(model.state_dict(), communicator, metas=metas)

    # an engine, another rank
    metas = agree(describe(model.state_dict()), group, src=0)
    receive_into(model.state_dict(), communicator, src=0)
    # or, if the tensors are not there yet, or go elsewhere:
    for name, tensor in receive_weights(metas, communicator, src=0):
        load(name, tensor)

A communicator is one of these:

- a gloo or NCCL group of ``stateless_init_torch_distributed_process_group``, or another group of
  torch. The rank is that in the group;
- ``refdist.nccl.NcclCommunicator``, or vLLM's ``PyNcclCommunicator``;
- a ``StatelessProcessGroup``, refdist's or vLLM's, for small weights, which pass through its store.
  vLLM's cannot read a float8 tensor, unless it is packed;
- anything with ``rank``, ``world_size`` and ``broadcast(tensor, src)``.

The format
    A chunk is a uint8 tensor: the elements of some weights in order, each in row-major order,
    without gaps and without a header. ``chunks.cut`` says which weights are in it. Not packed, each
    weight is a chunk. All ranks cut alike, because they know the same names, shapes and dtypes. So
    every rank must have them before, from ``agree``, or as vLLM's engine gets them, by a request.

What nobody can notice
    The bytes do not say what they are. With vLLM's code on the other side, or if ``agree`` is left
    out, a wrong order or dtype, or a shape with as many bytes, gives wrong weights, without an
    error. With another number of bytes, gloo kills the receiver if it gets too many (SIGABRT), and
    leaves a part unwritten if it gets too few; NCCL waits, or does either. With fewer chunks, the
    source waits for a receiver, or the receiver for the source, until its deadline. Only a
    StatelessProcessGroup compares: shape and dtype if not packed, else the number of bytes.
    vLLM's consumer cannot read some mixtures of dtypes: ``misaligned`` tells before.

When a rank dies
    The others get the error of the communicator, and its text says what was being sent or received.
    Over gloo it comes at once on most ranks, and on the others at their deadline: give a
    ``timeout``, because the group's own is 30 minutes if none was set. Over NCCL it comes at the
    deadline. A source over a StatelessProcessGroup does not notice.

Copies
    The source copies each weight once, into the chunk; a weight that is a chunk of its own, not
    even once. A receiver gets views of the chunk, without a copy. Two chunks are in memory at a
    time: one is packed, or loaded, while the other is on its way. So a model that fits into one
    chunk is packed before anything is sent, and a smaller buffer may be faster: over gloo, 64 MiB
    is large enough. ``Buffers`` keeps the memory for the next time.
    ``python -m refdist.benchmarks weights`` measures it.

To read the code: ``chunks`` (the format), ``sending``, ``receiving``, ``agreeing``, then
``channels`` (what communicators differ in), ``buffers`` and ``descriptions``.
"""

from refdist.weights.agreeing import agree
from refdist.weights.buffers import Buffers
from refdist.weights.chunks import BUFFER_BYTES, misaligned
from refdist.weights.descriptions import (
    NamedTensors,
    WeightMeta,
    WeightsMismatchError,
    describe,
)
from refdist.weights.receiving import receive_into, receive_weights
from refdist.weights.sending import send_weights

__all__ = [
    "BUFFER_BYTES",
    "Buffers",
    "NamedTensors",
    "WeightMeta",
    "WeightsMismatchError",
    "agree",
    "describe",
    "misaligned",
    "receive_into",
    "receive_weights",
    "send_weights",
]
