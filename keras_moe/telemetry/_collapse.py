"""Signs that a mixture is collapsing: what looks wrong in its figures.

Axis letters: g gates, e experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from keras_moe import _checks

# Below so many rows, or expected choices of an expert, chance alone gives signs.
_EXPECTED = 20


class Sign(NamedTuple):
    """One thing that looks wrong.

    Attributes:
        kind: "not finite", "dead expert", "dominant expert", "polarized gate", "gates
            alike", "experts alike" or "silent units".
        mixture: str, the name of the mixture.
        experts: tuple of the experts it is about; empty for a sign of gates.
        figure: float, what was seen.
        text: str, one sentence with the figure and what to try.
    """

    kind: str
    mixture: str
    experts: tuple[int, ...]
    figure: float
    text: str


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
        top_k: int, the choices of a router for a row; None for gates.
        dead_share: float. An expert is dead if every gate gives it less than this share
            of an even part. Nothing is looked for in fewer than 20 rows, and no dead
            experts of a router in fewer than 20 expected choices an expert.
        dominant_share: float. An expert is dominant if it has at least this share of
            what one expert can have, in every gate, and rows have at most half of the
            experts; a gate is polarized if one expert has this share of its weight.
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
    usage = np.asarray(figures["usage"])
    e = usage.shape[1]
    is_router = gates == ("router",)
    signs: list[Sign] = []
    readable = np.asarray(figures.get("readable", np.ones_like(usage)), bool)
    if e < 2 or figures["rows"] < _EXPECTED:
        return signs

    def add(kind: str, experts: Any, figure: float, text: str) -> None:
        found = tuple(int(k) for k in experts)
        signs.append(Sign(kind, name, found, float(figure), f"{name}: {text}"))

    finite = figures.get("finite_rows")
    if finite is not None and finite < 1:
        add(
            "not finite",
            (),
            finite,
            f"the weights of {1 - finite:.0%} of the rows are infinite or NaN. "
            "`keras_moe.callbacks.FiniteGuard` names the batch and the feature",
        )
    if not usage.any():
        return signs
    relative = figures.get("relative_usage")
    relative = (usage * e).max(axis=0) if relative is None else np.asarray(relative)
    expected = figures["rows"] * (top_k or 1) / e
    dead = np.flatnonzero(relative < dead_share)
    if dead.size and (not is_router or expected >= _EXPECTED):
        what = "choices" if is_router else "weight"
        add(
            "dead expert",
            dead,
            relative[dead].max(),
            f"{_named(dead)} {_have(dead)} less than {dead_share:.0%} of an even share "
            f"of the {what}. Try {_MORE_BALANCE if is_router else _OPEN_GATES}",
        )
    most = usage * (top_k or 1)
    everywhere = most.min(axis=0)
    chosen = readable.sum(axis=1) > 1  # Other gates have no choice.
    can_dominate = chosen.all() and 2 * (top_k or 1) <= e
    if everywhere.max() >= dominant_share and can_dominate:
        k = int(everywhere.argmax())
        what = "of the rows" if is_router else "of the weight in every gate"
        add(
            "dominant expert",
            [k],
            everywhere[k],
            f"expert {k} has {everywhere[k]:.0%} {what}. "
            f"Try {_MORE_BALANCE if is_router else _OPEN_GATES}",
        )
    elif not is_router:
        for i in np.flatnonzero((usage.max(axis=1) >= dominant_share) & chosen):
            k = int(usage[i].argmax())
            add(
                "polarized gate",
                [k],
                usage[i, k],
                f"the gate of {gates[i]} gives expert {k} {usage[i, k]:.0%} of its "
                f"weight. Try {_OPEN_GATES}",
            )
    distance = figures.get("gate_distance")
    if distance is not None and distance <= 1 - alike:
        add(
            "gates alike",
            (),
            distance,
            f"the gates of all tasks give the same weights (distance {distance:.3g}). "
            "If the tasks are alike, `SharedBottom` costs less; else try other "
            "`gate_inputs` or `PLE`",
        )
    similarity = figures.get("output_similarity")
    if similarity is not None:
        apart = np.asarray(similarity)[~np.eye(e, dtype=bool)].min()
        if apart >= alike:
            add(
                "experts alike",
                range(e),
                apart,
                f"the outputs of all experts have a correlation of at least "
                f"{apart:.3f}: they compute the same. Try another initializer (each "
                "expert needs draws of its own) or `dropout`",
            )
    zeros = figures.get("zero_activations")
    if zeros is not None:
        silent = np.flatnonzero(np.asarray(zeros) >= silent_share)
        if silent.size:
            add(
                "silent units",
                silent,
                np.asarray(zeros)[silent].min(),
                f"{_named(silent)} {_have(silent)} hidden activations of 0 for nearly "
                "all rows, without gradients. Try a smaller learning rate, normalized "
                'inputs or the activation "gelu"',
            )
    return signs


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
