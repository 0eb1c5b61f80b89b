import platform
import subprocess
import sys

import pytest

from janus.training import memory

# Only the module itself: loading torch would already have moved the threshold, which follows the frees of a process.
_SCRIPT = """
import ctypes
import runpy
import sys

class MallInfo(ctypes.Structure):  # malloc.h of glibc
    _fields_ = [(name, ctypes.c_int) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo.restype = MallInfo
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
assert runpy.run_path(sys.argv[1])["keep_freed_memory"]()
mapped = libc.mallinfo().hblkhd
blocks = [libc.malloc(20 << 20) for _ in range(12)]
mapped = libc.mallinfo().hblkhd - mapped
for block in blocks:
    libc.free(block)
print(mapped, libc.mallinfo().fordblks)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_large_blocks_come_from_the_heap_and_stay_there():
    """As the allocator counts them. By itself it maps a process's first large blocks, and a free returns them."""
    run = subprocess.run([sys.executable, "-c", _SCRIPT, memory.__file__], capture_output=True, text=True, check=True)
    mapped, kept = map(int, run.stdout.split())
    assert mapped == 0
    assert kept >= 240 << 20
