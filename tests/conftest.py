"""What holds for all tests."""

import os
import signal

import pytest

# torch looks up the name of each address that it connects to, and waits 5 s for a lost answer of a
# name server; so none is asked. "localhost" comes from a file.
os.environ.setdefault("RES_OPTIONS", "attempts:0")

# several tests run at once: a second thread for the sums of one would wait for it, and spin
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a run in the background of a shell starts with SIGINT ignored, and some tests send it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def running_engines():
    # slow to import, and few tests need it
    from refdist.lab.engines import LocalEngines
    from refdist.lab.stuck import RECORDING

    with LocalEngines(4, environment=RECORDING) as four:
        four.view.execute("at_first = {'at_first', *globals()}", block=True)
        yield four


@pytest.fixture(scope="module")
def engines(running_engines):
    """Four engines, with no name of the module before. To start them costs seconds.

    The modules that use them are in one group of xdist.
    """
    running_engines.offer_port()
    yield running_engines
    forget = "for name in set(globals()) - at_first: del globals()[name]"
    running_engines.view.execute(forget, block=True)
