"""Windows and caches of a large trace, in a process of its own: the second part of `workbench bench analysis`."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.bench.generated import Generated


def large(n_tokens: int, n_layers: int) -> dict[str, Any]:
    """SRP, SCH and caches of a large trace, in a process of its own."""
    code = f"from workbench.bench.large import measure; measure({n_tokens}, {n_layers})"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(n_tokens: int, n_layers: int) -> None:
    """Print what `large` reports. The time for making up the ids is in no part: it is `making_ids`."""
    trace = Generated(n_tokens, n_layers=n_layers)
    parts: dict[str, Any] = {}
    for name, ask in parts_of_it().items():
        before = clocks(trace)
        frame = ask(trace)
        wall, cpu = (after - begin for after, begin in zip(clocks(trace), before, strict=True))
        parts[name] = {"seconds": round(wall, 1), "cpu_seconds": round(cpu, 1), "rows": len(frame)}
        print(f"  {name}: {parts[name]}, {peak() / 1e9:.2f} GB", file=sys.stderr, flush=True)
    result = {
        "tokens": trace.n_tokens,
        "layers": n_layers,
        "parts": parts,
        "seconds": round(sum(part["seconds"] for part in parts.values()), 1),
        "cpu_seconds": round(sum(part["cpu_seconds"] for part in parts.values()), 1),
        "making_ids": {"seconds": round(trace.seconds, 1), "cpu_seconds": round(trace.cpu_seconds, 1)},
        "peak_bytes": peak(),
    }
    print(json.dumps(result))


def clocks(trace: Generated) -> tuple[float, float]:
    """Now by the clock and in processor time, without what making ids took."""
    return time.perf_counter() - trace.seconds, time.process_time() - trace.cpu_seconds


def parts_of_it() -> dict[str, Callable[[Any], pd.DataFrame]]:
    """Everything about windows and caches, with the defaults: all windows, policies and capacities, 1,000 resamples."""
    from workbench.analysis.cache import POLICIES, cache
    from workbench.analysis.consistency import consistency
    from workbench.analysis.segment_cache import segment_cache

    return {
        "SRP": consistency,
        "SCH": lambda trace: segment_cache(trace, baselines=False),
        "cache": lambda trace: cache(trace, policies=POLICIES),
    }


def peak() -> int:
    """Most bytes that this process ever held. (`ru_maxrss` begins with the peak of the process that started it.)"""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
