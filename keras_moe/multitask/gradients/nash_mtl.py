"""Nash-MTL: the update as the solution of a bargaining game (Navon et al. 2022).

Axis letters: t tasks.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.multitask._weighting_layer import assign_where, value_of
from keras_moe.multitask.gradients._base import GradientWeighting
from keras_moe.multitask.gradients._gramian import correlations, times

_ITERATIONS = 40
_RIDGE = 1e-6


@keras.saving.register_keras_serializable("keras_moe")
class NashMTL(GradientWeighting):
    """Weights of the Nash bargaining solution, which ignores the scale of each loss.

    The weights solve G w = 1 / w for the Gramian G (claim 3.1): every task gains the
    same in relative terms. They minimise w.G w / 2 - sum_i log w_i, a convex problem
    that a damped Newton method solves here, with a relative error below 1e-3; the paper
    solves a sequence of linearised problems.

    Orthogonal gradients get w_i proportional to 1 / norm(g_i). For orthogonal gradients
    of equal norm all weights are 1: the plain sum of the losses. For that the Gramian
    is divided by its mean diagonal; the paper's code divides it by its Frobenius norm,
    which makes the weights t^(1/4) there. The paper's limit of the norm of the update
    is `clipnorm` or `global_clipnorm` of an optimizer. Of opposite gradients, whose
    weights would be infinite, the Gramian of the unit gradients has 1e-6 added to its
    diagonal. A gradient of 0 has the weight 0 and is left out.

    Args:
        update_every: int, number of training steps for which weights are kept. The
            weights of tasks that no solution has covered are 1.
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        gramian: float tensor of shape `(t, t)`, the entries g_i . g_j.
        task_losses: not used.
        mask: bool tensor of shape `(t,)`, False for undefined tasks.
        training: bool, whether this is a step; otherwise the weights are those of the
            given Gramian.

    Returns:
        Weights of shape `(t,)`, none below 0.

    Raises:
        ValueError: if `update_every` is invalid or the shapes do not match.

    Attributes:
        last_weights: variable of shape `(t,)`, the weights in use, and `steps`, the
            number of training steps; only if `update_every` > 1.

    Example:

    >>> weights = keras_moe.multitask.gradients.NashMTL()(np.diag([0.5, 0.5, 2.0]))
    >>> np.asarray(weights).round(3)  # |g|: 1 / sqrt(2), 1 / sqrt(2), sqrt(2)
    array([1.414, 1.414, 0.707], dtype=float32)

    References:
        - [Navon et al., 2022: Multi-Task Learning as a Bargaining
          Game](https://arxiv.org/abs/2202.01017)
    """

    def __init__(self, update_every: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.update_every = _checks.positive_int("update_every", update_every)

    def build(self, input_shape: tuple[int, ...]) -> None:
        if self.update_every > 1:
            self.last_weights = self.add_statistic(
                "last_weights", (input_shape[0],), "ones"
            )
            self.steps = self.add_statistic("steps", ())

    def weights_of(self, gramian: Any, task_losses: Any, mask: Any, update: Any) -> Any:
        if update is False or self.update_every == 1:
            return _bargain(gramian)
        kept = value_of(self.last_weights)
        steps = value_of(self.steps)
        weights = ops.cond(
            ops.equal(steps, 0.0),
            lambda: ops.where(mask, _bargain(gramian), kept),
            lambda: kept,
        )
        assign_where(update, self.last_weights, weights)
        following = steps + 1.0
        assign_where(
            update, self.steps, ops.where(following < self.update_every, following, 0.0)
        )
        return weights

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "update_every": self.update_every}


def _bargain(gramian: Any) -> Any:
    """Return the solution of G w = 1 / w."""
    unit, norms, active = correlations(gramian)
    identity = ops.eye(gramian.shape[0], dtype=gramian.dtype)
    unit = unit + _RIDGE * identity

    # x_i = w_i norm(g_i). The function is self-concordant: steps of 1 / (1 + decrement)
    # keep x positive and converge from any start (Boyd & Vandenberghe, 2004, 9.6).
    def step(x: Any, decrement: Any) -> tuple[Any, Any]:
        gradient = times(unit, x) - 1.0 / x
        hessian = unit + ops.square(1.0 / x)[:, None] * identity
        change = ops.solve(hessian, -gradient)
        decrement = ops.sqrt(ops.maximum(-ops.sum(gradient * change), 0.0))
        rate = ops.where(decrement > 0.25, 1.0 / (1.0 + decrement), 1.0)
        return x + rate * change, decrement

    x, _ = ops.while_loop(
        lambda x, decrement: decrement > 1e-3,  # The last step squares it.
        step,
        (ops.ones_like(norms), ops.ones_like(norms[0])),
        maximum_iterations=_ITERATIONS,
    )
    return ops.where(active, x / norms, 0.0)
