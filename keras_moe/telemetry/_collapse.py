"""Signs that a mixture is collapsing: what looks wrong in its figures.

Axis letters: g gates, e experts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from keras_moe import _checks

# Below so many rows, or expected choices of an expert, chance alone gives signs.
LEAST_ROWS = 20


class Sign(NamedTuple):
    """One thing that looks wrong.

    Attributes:
        kind: "not finite", "dead expert", "dominant expert", "polarized gate", "gates
            alike", "experts alike" or "silent units".
        mixture: str, the name of the mixture.
        experts: tuple of the experts it is about; empty for a sign of gates.
        figure: float, what was seen.
        text: str, one sentence with the figure and what to try.
        gate: str, the gate that a polarized gate is; "" for other signs.
    """

    kind: str
    mixture: str
    experts: tuple[int, ...]
    figure: float
    text: str
    gate: str = ""


def rows_needed(num_experts: int, top_k: int) -> int:
    """Return the number of rows below which a router's dead experts are not looked for.

    With fewer, an expert may have no row by chance: the rows are those of 20 choices
    for each expert, `20 * num_experts / top_k`.

    Args:
        num_experts: int, the experts of the router.
        top_k: int, the experts of a row.

    Example:

    >>> keras_moe.telemetry.rows_needed(num_experts=64, top_k=2)
    640
    """
    num_experts = _checks.positive_int("num_experts", num_experts)
    top_k = _checks.positive_int("top_k", top_k)
    return math.ceil(LEAST_ROWS * num_experts / top_k)


def rows_for_all_signs(figures: dict[str, Any]) -> int:
    """Return the rows that all signs of a mixture need.

    Args:
        figures: dict, of `summarise`, with "gates" and "top_k" of the mixture.
    """
    top_k = figures.get("top_k")
    if figures["gates"] != ("router",) or top_k is None:
        return LEAST_ROWS
    return max(LEAST_ROWS, rows_needed(len(figures["load"]), top_k))


def signs_of_collapse(
    name: str,
    gates: tuple[str, ...],
    figures: dict[str, Any],
    top_k: int | None = None,
    *,
    dead_share: float = 0.01,
    dominant_share: float = 0.95,
    silent_share: float = 0.99,
    alike: float = 0.99,
) -> list[Sign]:
    """Return what looks wrong in the figures of a mixture.

    Args:
        name: str, the name of the mixture.
        gates: the names of its g gates.
        figures: dict, of `summarise`.
        top_k: int, the experts of a row, of a router or of gates that choose so many;
            None for other gates.
        dead_share: float. An expert is dead if every gate gives it less than this share
            of an even part. Nothing is looked for in fewer than 20 rows, and no dead
            experts of a router in fewer than `rows_needed`.
        dominant_share: float. An expert is dominant if it has at least this share of
            what one expert can have, in every gate, and rows have at most half of the
            experts. A gate is polarized if one expert has this share of its weight, or
            if on average over rows the expert with the largest weight has it, unless
            it chooses one expert for a row by design.
        silent_share: float. The units of an expert are silent if at least this share
            of its hidden activations is zero.
        alike: float. Experts are alike if the outputs of all have at least this
            correlation; gates if their largest distance is at most 1 minus this.

    Returns:
        A list of `Sign`.

    Raises:
        ValueError: if a share is not in [0, 1).

    Example:

    >>> figures = {"usage": np.array([[1.0, 0.0]]), "rows": 100}
    >>> signs = keras_moe.telemetry.signs_of_collapse("moe", ("router",), figures, 1)
    >>> [sign.kind for sign in signs]
    ['dead expert', 'dominant expert']
    """
    dead_share = _checks.rate("dead_share", dead_share)
    dominant_share = _checks.rate("dominant_share", dominant_share)
    silent_share = _checks.rate("silent_share", silent_share)
    alike = _checks.rate("alike", alike)
    seen = _Seen(name, gates, figures, top_k)
    if seen.num_experts < 2 or seen.rows < LEAST_ROWS:
        return []
    signs = [*_not_finite(seen)]
    if seen.usage.any():
        signs += _dead_experts(seen, dead_share)
        signs += _dominant_expert(seen, dominant_share) or _polarized_gates(
            seen, dominant_share
        )
        signs += _gates_alike(seen, alike)
        signs += _experts_alike(seen, alike)
        signs += _silent_units(seen, silent_share)
    return signs


class _Seen:
    """The figures of a mixture, as the signs read them."""

    def __init__(
        self,
        name: str,
        gates: tuple[str, ...],
        figures: dict[str, Any],
        top_k: int | None,
    ) -> None:
        self.name, self.gates, self.figures = name, gates, figures
        self.usage = np.asarray(figures["usage"])  # (g, e)
        self.num_experts = self.usage.shape[1]
        self.rows = figures["rows"]
        self.is_router = gates == ("router",)
        self.choices = (top_k or 1) if self.is_router else 1  # of one row
        self.chooses_one = top_k == 1
        self.remedy = _MORE_BALANCE if self.is_router else _OPEN_GATES

    def get(self, figure: str) -> Any:
        return self.figures.get(figure)

    def has_choice(self) -> np.ndarray:
        """Return bool (g,): whether a gate can have more than one expert."""
        readable = np.asarray(self.figures.get("readable", np.ones_like(self.usage)))
        return readable.astype(bool).sum(axis=1) > 1

    def sign(self, kind: str, experts: Any, figure: float, text: str) -> Sign:
        found = tuple(int(k) for k in experts)
        return Sign(kind, self.name, found, float(figure), f"{self.name}: {text}")


def _not_finite(seen: _Seen) -> list[Sign]:
    finite = seen.get("finite_rows")
    if finite is None or not finite < 1:
        return []
    text = (
        f"the weights of {1 - finite:.0%} of the rows are infinite or NaN. "
        "`keras_moe.callbacks.FiniteGuard` names the batch and the feature"
    )
    return [seen.sign("not finite", (), finite, text)]


def _dead_experts(seen: _Seen, share: float) -> list[Sign]:
    relative = seen.get("relative_usage")
    if relative is None:
        relative = (seen.usage * seen.num_experts).max(axis=0)
    relative = np.asarray(relative)
    dead = np.flatnonzero(relative < share)
    needed = rows_needed(seen.num_experts, seen.choices) if seen.is_router else 0
    if not dead.size or seen.rows < needed:
        return []
    what = "choices" if seen.is_router else "weight"
    text = (
        f"{_named(dead)} {_have(dead)} less than {share:.0%} of an even share of the "
        f"{what}. Try {seen.remedy}"
    )
    return [seen.sign("dead expert", dead, relative[dead].max(), text)]


def _dominant_expert(seen: _Seen, share: float) -> list[Sign]:
    everywhere = (seen.usage * seen.choices).min(axis=0)
    can_dominate = seen.has_choice().all() and 2 * seen.choices <= seen.num_experts
    if not (can_dominate and everywhere.max() >= share):
        return []
    k = int(everywhere.argmax())
    what = "of the rows" if seen.is_router else "of the weight in every gate"
    text = f"expert {k} has {everywhere[k]:.0%} {what}. Try {seen.remedy}"
    return [seen.sign("dominant expert", [k], everywhere[k], text)]


def _polarized_gates(seen: _Seen, share: float) -> list[Sign]:
    if seen.is_router or seen.chooses_one:
        return []
    by_row = seen.get("largest_weight")
    by_row = np.zeros(len(seen.gates)) if by_row is None else np.asarray(by_row)
    signs = []
    for i in np.flatnonzero(seen.has_choice()):
        k, gate = int(seen.usage[i].argmax()), seen.gates[i]
        if seen.usage[i, k] >= share:
            experts, figure = [k], seen.usage[i, k]
            text = f"the gate of {gate} gives expert {k} {figure:.0%} of its weight"
        elif by_row[i] >= share:
            experts, figure = [], by_row[i]
            text = f"the gate of {gate} gives one expert {figure:.0%} of a row's weight"
        else:
            continue
        text = f"{text}. Try {seen.remedy}"
        sign = seen.sign("polarized gate", experts, figure, text)
        signs.append(sign._replace(gate=gate))
    return signs


def _gates_alike(seen: _Seen, alike: float) -> list[Sign]:
    distance = seen.get("gate_distance")
    if distance is None or not distance <= 1 - alike:
        return []
    text = (
        f"the gates of all tasks give the same weights (distance {distance:.3g}). If "
        "the tasks are alike, `SharedBottom` costs less; else try other `gate_inputs` "
        "or `PLE`"
    )
    return [seen.sign("gates alike", (), distance, text)]


def _experts_alike(seen: _Seen, alike: float) -> list[Sign]:
    similarity = seen.get("output_similarity")
    if similarity is None:
        return []
    e = seen.num_experts
    apart = np.asarray(similarity)[~np.eye(e, dtype=bool)].min()
    if not apart >= alike:
        return []
    text = (
        f"the outputs of all experts have a correlation of at least {apart:.3f}: they "
        "compute the same. Try another initializer (each expert needs draws of its "
        "own) or `dropout`"
    )
    return [seen.sign("experts alike", range(e), apart, text)]


def _silent_units(seen: _Seen, share: float) -> list[Sign]:
    zeros = seen.get("zero_activations")
    if zeros is None:
        return []
    silent = np.flatnonzero(np.asarray(zeros) >= share)
    if not silent.size:
        return []
    text = (
        f"{_named(silent)} {_have(silent)} hidden activations of 0 for nearly all "
        "rows, without gradients. Try a smaller learning rate, normalized inputs or "
        'the activation "gelu"'
    )
    return [seen.sign("silent units", silent, np.asarray(zeros)[silent].min(), text)]


_MORE_BALANCE = (
    'a larger `load_balancing_loss_weight`, the router "bias_balanced" or a larger '
    "`top_k`"
)
_OPEN_GATES = (
    "normalized gate inputs, or `gate_dropout` and a larger `gate_temperature` if the "
    "layer has them"
)


def _named(experts: np.ndarray) -> str:
    shown = ", ".join(map(str, experts[:8])) + (" ..." if experts.size > 8 else "")
    return f"expert {shown}" if experts.size == 1 else f"experts {shown}"


def _have(experts: np.ndarray) -> str:
    return "has" if experts.size == 1 else "have"
