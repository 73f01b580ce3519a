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
- anything with ``rank``, ``world_size`` and ``broadcast(tensor, src)`` for uint8 tensors. So also a
  ``StatelessProcessGroup``, for small weights, which pass through its store.

The format
    A chunk is a uint8 tensor: the elements of some weights in order, each in row-major order,
    without gaps and without a header. ``chunks.cut`` says which weights are in it. Not packed, each
    weight is a chunk. All ranks cut alike, because they know the same names, shapes and dtypes. So
    every rank must have them before, from ``agree``, or as vLLM's engine gets them, by a request.

    vLLM's consumer raises a RuntimeError at a tensor that is misaligned: the bytes before it in its
    chunk are no multiple of the size of its elements. Weights of one dtype are always aligned, and
    so are those that are sorted by that size, the largest first. refdist reads both.

What nobody can notice
    The bytes do not say what they are. With vLLM's code on the other side, or if ``agree`` is left
    out, a wrong order or dtype, or a shape with as many bytes, gives wrong weights, without an
    error. If the source sends more bytes than a receiver expects, gloo kills the receiver
    (SIGABRT). If it sends fewer, the receiver returns over gloo, and the rest of its weights is not
    written. NCCL waits until the deadline, or does either of these. A StatelessProcessGroup raises.
    With another number of chunks, one side waits for the other until its deadline.

When a transfer breaks off
    A rank that gets an error, is interrupted, or does not take all weights, may not use the
    communicator for another transfer, because other ranks may still be in this one: it gets a
    CollectiveError. Destroy the communicator on all ranks and form another. To destroy a gloo group
    takes until the broadcast that is under way has ended: ``timeout``, or the group's own.

When a rank dies
    The others get the error of the communicator, which begins with the weights that were under way.
    Over gloo it comes at once on most ranks, and on the others at their deadline: give a
    ``timeout``, because the group's own is 30 minutes if none was set. Over NCCL it comes at the
    deadline. A source over a StatelessProcessGroup does not notice.

Copies and memory
    The source copies each weight once, into the chunk; a weight that is a chunk of its own, not
    even once. A receiver gets views of the chunk, without a copy. On a GPU, one chunk is packed, or
    loaded, while another is broadcast: this takes memory for two chunks, and for three in
    ``receive_weights``. A smaller buffer needs less, and lets a small model have several chunks:
    256 MiB is large enough. On a CPU, up to two chunks stay in memory for the next transfer, as
    long as the communicator lives. Over gloo, 64 MiB is large enough.
    ``python -m refdist.benchmarks weights`` measures it, and ``nccl`` in its place on GPUs.

To read the code: ``descriptions``, ``chunks`` (the format), ``transfers``, then ``channels`` (what
communicators differ in) and ``memory``.
"""

from refdist.weights.descriptions import (
    BUFFER_BYTES,
    NamedTensors,
    WeightMeta,
    agree,
    describe,
)
from refdist.weights.transfers import receive_into, receive_weights, send_weights

__all__ = [
    "BUFFER_BYTES",
    "NamedTensors",
    "WeightMeta",
    "agree",
    "describe",
    "receive_into",
    "receive_weights",
    "send_weights",
]


def __dir__() -> list[str]:
    return __all__
