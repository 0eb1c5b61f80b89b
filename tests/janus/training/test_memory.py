import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import ctypes, sys
import torch
from janus.training.memory import keep_freed_memory

class MallInfo(ctypes.Structure):  # malloc.h of glibc
    _fields_ = [(name, ctypes.c_int) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

mallinfo = ctypes.CDLL(None).mallinfo
mallinfo.restype = MallInfo
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(2):
    blocks = [torch.ones(5 << 20) for _ in range(4)]  # 20 MiB each
    del blocks
print(mallinfo().arena)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_blocks_stay_on_the_heap():
    """The heap's size as the allocator states it; counts of page faults differ from kernel to kernel."""
    keep, default = (
        int(subprocess.run([sys.executable, "-c", _SCRIPT, mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("keep", "default")
    )
    assert keep - default > 75 << 20
