"""The machine that a benchmark runs on, and how busy other work keeps it meanwhile."""

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("jax", "tensorstore", "grain", "numpy")
STAT = Path("/proc/stat")
# Columns of its first line, in ticks of all cores: user, nice, system, idle, iowait, irq, softirq, steal (proc(5)).
BUSY = (0, 1, 2, 5, 6, 7)


def describe_machine() -> dict[str, Any]:
    """Describe the machine and libraries that the figures depend on."""
    import jax

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }


class OtherWork:
    """The cores that other processes keep busy, in the mean since this was made."""

    def __init__(self) -> None:
        self._start = _now()

    def cores(self) -> float | None:
        """Return their number, the time that a hypervisor takes included; None where the system does not say."""
        now = _now()
        if now is None or self._start is None:
            return None
        seconds, busy, own = (after - before for after, before in zip(now, self._start, strict=True))
        return max(0.0, busy - own) / seconds if seconds > 0 else 0.0


def _now() -> tuple[float, float, float] | None:
    """(time, seconds of all cores that were busy, those of this process and its ended children)."""
    if not STAT.exists():
        return None
    ticks = [int(word) for word in STAT.read_text().splitlines()[0].split()[1:]]
    busy = sum(ticks[column] for column in BUSY) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy, sum(os.times()[:4])


def _cpu_name() -> str:
    """From /proc/cpuinfo, where there is one."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
