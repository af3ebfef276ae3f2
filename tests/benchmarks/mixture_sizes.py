"""How experts are shared out in `PLE`."""

from __future__ import annotations

NUM_LEVELS = 2


def ple_sizes(experts: int) -> dict[str, int]:
    """Return the numbers of experts of PLE with two tasks.

    Args:
        experts: number of experts of a level: a quarter is shared, the others are
            divided between the two tasks.
    """
    shared = experts // 4
    own = (experts - shared) // 2
    return {
        "num_levels": NUM_LEVELS,
        "num_shared_experts": shared,
        "num_task_experts": own,
    }
