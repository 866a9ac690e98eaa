"""`keep_freed_memory`: a large tensor that is freed and made again is not paged in anew."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
import lora_kernels as lk

if sys.argv[1] == "kept":
    assert lk.keep_freed_memory() and lk.keep_freed_memory()
torch.set_num_threads(1)
for i in range(24):
    if i == 20:  # the first ones leave gaps between them
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's mallopt")
def test_freed_memory_is_used_again():
    kept, default = page_faults("kept"), page_faults("default")
    assert kept < default / 4, "the system faults in a page now and then, on a busy machine too"
