"""Let a stranger write into the stores of live groups, for long. See ``strangers.py``.

Prints the seed, with which the same inputs come again, and a line for each part. Ends with 1 if
something happened that must not.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from itertools import cycle, product

# a server that refuses a request says so with a stack trace; read when torch is imported
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from ranks import LOCAL, RankFailedError, run_ranks
from strangers import aim, storm

from refdist import create_tcp_store

PARTS = ((aim, 1, 4000), (storm, 4, 500))  # what, on how many processes, and how many inputs
DEADLINE = 600.0  # seconds for one part


def servers() -> list[bool]:
    """Which servers this torch can run: libuv (True), legacy (False)."""
    found = []
    for libuv in (True, False):
        try:
            create_tcp_store(LOCAL, 0, is_master=True, use_libuv=libuv)
        except NotImplementedError:
            print(f"no server with libuv={libuv} on this torch")
            continue
        found.append(libuv)
    return found


def main() -> int:
    """Returns 0 if nothing happened that must not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    total, failures, start = Counter(), 0, time.monotonic()
    plan = cycle(product(PARTS, [True, False], servers()))
    for number, ((function, processes, inputs), secret, libuv) in enumerate(plan):
        if total["inputs"] >= options.inputs:
            break
        what = f"{function.__name__}, {'' if secret else 'no '}secret, "
        what += "libuv" if libuv else "legacy"
        inputs = min(inputs, options.inputs - total["inputs"])
        seed = f"{options.seed}/{number}"
        try:
            with tempfile.TemporaryDirectory() as folder:
                *_, counts = run_ranks(
                    function, processes, inputs, seed, secret, libuv, folder, deadline=DEADLINE
                )
        except RankFailedError as error:
            failures += 1
            counts = Counter(inputs=inputs)
            print(f"FAILED: {what}, seed {seed}:\n{error}", flush=True)
        total += counts
        seconds = time.monotonic() - start
        print(f"{total['inputs']:7} inputs, {seconds:5.0f} s, {what}", flush=True)
    for name, count in total.most_common():
        print(f"{count:8} {name}")
    print(f"{failures} parts failed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
