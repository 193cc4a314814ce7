"""What tensors on the CPU hold while something runs, by torch's own count of its allocator.

Unlike the resident set this does not depend on what the system's allocator does with freed memory.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def held(run: Callable[[], object]) -> list[int]:
    """Bytes more than at the start, after each allocation and release of one ``run``.

    What ``run`` returns still lives at the end of the list; its maximum is the peak.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    return list(accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())))
