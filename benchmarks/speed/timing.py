"""Ways to do the same, timed side by side: one after the other in each repeat, so that all see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def side_by_side(ways: Mapping[str, Callable[[], object]], repeats: int, calls: int = 1) -> dict[str, list[float]]:
    """Seconds per call of each way, one value for each repeat, after a warm-up that does not count.

    Args:
        ways: what to time, by name.
        repeats: timed repeats.
        calls: in each repeat, for ways that are too short to be timed alone.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(calls):
                way()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: values[1:] for name, values in seconds.items()}
