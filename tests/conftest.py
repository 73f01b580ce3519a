"""What holds for all tests."""

import os

# torch looks up the name of each address that it connects to; a lost answer costs 5 s, or 1
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
