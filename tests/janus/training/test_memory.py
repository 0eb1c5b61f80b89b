import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import resource, sys
import torch
from janus.training.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use():
    blocks = [torch.ones(5 << 20) for _ in range(4)]  # 20 MiB each: all at the end of the heap

use()
before = faults()
for _ in range(10):
    use()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_pages_are_reused():
    keep, default = (
        int(subprocess.run([sys.executable, "-c", _SCRIPT, mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("keep", "default")
    )
    assert default > 4 * keep
