"""vLLM's own protocol, for a group in which some ranks run vLLM's class: ``wire="vllm"``.

``messages`` first: an object is one value, a bare pickle, under a key with a number that both sides
count. A gather is a broadcast by each rank, and a barrier begins with a broadcast by rank 0
(``barrier``). ``meeting`` opens the store as vLLM's ranks do.

refdist's rank keeps its own promises: each call ends in time, can be interrupted, and names the
ranks that it misses. What the protocol itself does not have, no rank can add:

=======================  ========================================================================
agreement                A barrier or a gather may fail on one rank and succeed on another. A rank
                         that comes late passes alone; the next barrier is in step again, if every
                         rank has called this one once. A rank that has no object to give to a
                         gather raises at once, and the others when their time is up.
two senders              Two ranks that send to the same rank use the same keys. A sender of refdist
                         whose key is taken raises a MessageError, also if a rank of vLLM has read
                         the message that is there. A sender of vLLM writes over it.
expiry that tells        A message that expired looks like one that was never sent: the receiver
                         waits until its time is up.
clean-up                 Nothing is deleted before it expires, except the keys of a barrier that
                         succeeded, and messages that a rank of refdist has read. ``close`` on rank
                         0 ends the store at once, so the other ranks must have finished: pass a
                         barrier before.
names at creation        The store counts the ranks that come and does not know them.
tags                     A secret cannot be used. What comes is therefore unpickled as plain data
                         (``messages="plain"``), unless the caller trusts every process that
                         reaches the store.
realigning               A rank that has made another number of calls cannot be brought into step.
=======================  ========================================================================

Seen in the store, with vLLM 0.9.0, 0.19.0, 0.27.0 and 0.33.0 on torch 2.13.
"""
