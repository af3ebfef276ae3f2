"""ESCM2: conversions of all impressions, by inverse propensities or doubly robust.

Axis letters: n rows.

With clicks o, conversions r, click probability p (the propensity, clipped, without
gradient), conversion rate q, e = log loss(r, q):
IPW: R = 1/n sum o e / p                                    (Wang et al. 2022, eq. 8)
DR:  R = 1/n sum (ê + o (e - ê) / p),  R_imp = 1/n sum o (e - ê)^2 / p      (eq. 11, 13)
L = loss(o, p) + conversion_weight R (+ R_imp) + joint_weight loss(o r, p q)   (eq. 16)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.multitask.entire_space._base import EntireSpace
from keras_moe.multitask.heads.binary import LogLoss, log_loss
from keras_moe.multitask.joint_loss import JointLoss, Rows, weights_or_ones
from keras_moe.multitask.task import Task


@keras.saving.register_keras_serializable("keras_moe")
class CounterfactualLoss(JointLoss):
    """The risk of the conversion rate over all impressions; see `ESCM2`."""

    def __init__(
        self,
        method: str,
        stages: Sequence[str],
        weight: float = 1.0,
        min_propensity: float = 0.05,
    ) -> None:
        self.method = method
        self.stages = tuple(stages)
        self.weight = weight
        self.min_propensity = min_propensity

    def call(self, rows: dict[str, Rows], outputs: dict[str, Any]) -> Any:
        first, second = self.stages
        rate = ops.squeeze(outputs[second], -1)
        labels = ops.cast(rows[second].labels, rate.dtype)
        # The click's sample weight, and 1 where there is a click with a known label.
        weights = ops.cast(weights_or_ones(rows[first]), rate.dtype)
        clicked = ops.cast(weights_or_ones(rows[second]) > 0, rate.dtype)
        propensity = ops.stop_gradient(ops.squeeze(outputs[first], -1))
        inverse = clicked / ops.maximum(propensity, self.min_propensity)
        error = log_loss(labels, rate)
        if self.method == "ipw":
            risk = inverse * error
        else:
            imputed = ops.squeeze(outputs[f"imputed_{second}"], -1)
            expected = log_loss(ops.stop_gradient(imputed), rate)
            risk = expected + inverse * (error - expected)
            fixed = ops.stop_gradient(rate)
            difference = log_loss(labels, fixed) - log_loss(imputed, fixed)
            risk = risk + inverse * ops.square(difference) / self.weight
        return self.weight * ops.divide_no_nan(
            ops.sum(risk * weights), ops.sum(weights)
        )

    def get_config(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "stages": list(self.stages),
            "weight": self.weight,
            "min_propensity": self.min_propensity,
        }


@keras.saving.register_keras_serializable("keras_moe")
class ScaledLogLoss(LogLoss):
    """A log loss times a constant."""

    def __init__(self, weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weight = weight

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self.weight * super().call(y_true, y_pred)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "weight": self.weight}


@keras.saving.register_keras_serializable("keras_moe")
class ESCM2(EntireSpace):
    """Entire-space counterfactual multi-task model of clicks and conversions.

    The loss of a clicked impression is divided by its click probability, so that the
    clicks stand for all impressions. This corrects for clicks that depend on the
    features of the model, not on what the model does not see. The propensity is the
    model's own click probability, without gradient.

    The paper predicts the error ê with a tower. Such an ê does not depend on the
    conversion rate, so the doubly robust risk would have the gradient of the IPW risk.
    Here the tower predicts the conversion of impressions without a click, m, and ê is
    the log loss of the rate against m (as in Wang et al. 2019, section 4). m learns
    only from R_imp, and the rate only from R.

    Args:
        stages: the names of the two events.
        method: "ipw" or "dr" (doubly robust).
        conversion_weight: float > 0, the weight of R.
        joint_weight: float >= 0, the weight of the loss of ESMM.
        min_propensity: float in (0, 1], propensities below are raised to it: a bias
            for a bounded variance. At 1 the method "ipw" is the naive loss times the
            share of clicks.
        **kwargs: passed on to `keras.layers.Layer`.

    Call arguments:
        inputs: dict of logits `(n, 1)` with the names of the stages, and for "dr" also
            "imputed_<second stage>", such as "imputed_conversion".

    Returns:
        The same outputs as `ESMM`, and for "dr" also "imputed_<second stage>".

    Raises:
        ValueError: if an argument or the keys of the inputs are invalid.

    Example:

    >>> escm2 = keras_moe.multitask.ESCM2(method="dr")
    >>> escm2.input_names
    ('click', 'conversion', 'imputed_conversion')

    References:
        - [Wang et al., 2022: ESCM2: Entire Space Counterfactual Multi-Task Model for
          Post-Click Conversion Rate Estimation](https://arxiv.org/abs/2204.05125)
        - [Wang et al., 2019: Doubly Robust Joint Learning for Recommendation on Data
          Missing Not at Random](https://proceedings.mlr.press/v97/wang19n.html)
    """

    def __init__(
        self,
        stages: Sequence[str] = ("click", "conversion"),
        *,
        method: str = "ipw",
        conversion_weight: float = 1.0,
        joint_weight: float = 1.0,
        min_propensity: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(stages, **kwargs)
        if len(self.stages) != 2:
            raise ValueError(
                f"`stages` must name two events. Received: stages={list(stages)!r}"
            )
        self.method = _checks.one_of("method", method, ("ipw", "dr"))
        self.conversion_weight = _checks.positive_number(
            "conversion_weight", conversion_weight
        )
        self.joint_weight = _checks.non_negative_number("joint_weight", joint_weight)
        self.min_propensity = _checks.positive_number("min_propensity", min_propensity)
        if self.min_propensity > 1:
            raise ValueError(
                "`min_propensity` must be in (0, 1]. "
                f"Received: min_propensity={min_propensity!r}"
            )

    @property
    def input_names(self) -> tuple[str, ...]:
        if self.method == "ipw":
            return self.stages
        return (*self.stages, f"imputed_{self.stages[1]}")

    def call(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        outputs = super().call(inputs)
        for name in self.input_names[2:]:
            logits = ops.cast(inputs[name], self.precise_dtype)
            outputs[name] = keras.activations.sigmoid(logits)
        return outputs

    def compute_output_shape(self, input_shape: Mapping[str, Any]) -> dict[str, Any]:
        outputs = super().compute_output_shape(input_shape)
        return outputs | {n: tuple(input_shape[n]) for n in self.input_names[2:]}

    def _declare(self, metrics: Mapping[str, Sequence[Any]]) -> list[Task]:
        risk = CounterfactualLoss(
            self.method, self.stages, self.conversion_weight, self.min_propensity
        )
        joint = ScaledLogLoss(self.joint_weight) if self.joint_weight else None
        return [
            self._first(metrics),
            self._conditional(1, metrics, loss=risk),
            self._joint(1, metrics, loss=joint),
        ]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "method": self.method,
            "conversion_weight": self.conversion_weight,
            "joint_weight": self.joint_weight,
            "min_propensity": self.min_propensity,
        }
