"""What holds for all tests."""

import os
import signal

# torch looks up the name of each address that it connects to; a lost answer costs 5 s, or 1
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

# a run in the background of a shell starts with SIGINT ignored, and some tests send it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
