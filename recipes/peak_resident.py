"""The largest resident memory of this process so far."""

import sys
from pathlib import Path

import psutil


def peak_resident() -> int:
    """Return it in bytes."""
    # Not getrusage on Linux: its ru_maxrss starts at the parent's peak, which exec() does not reset. VmHWM does.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
