"""Sinkhorn routing, S-BASE (Clark et al. 2022; Cuturi 2013).

Axis letters: n tokens, d input features, e experts, k choices per token.

In training the choice is the top k of scores balanced over the batch.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _checks, routing
from keras_moe.routers import _scoring
from keras_moe.routers._base import LinearRouter


@keras.saving.register_keras_serializable("keras_moe")
class SinkhornRouter(LinearRouter):
    """Top-k routing of logits that are balanced over the experts in training.

    Sinkhorn's iteration scales `exp(logits / temperature)` until every expert has the
    same sum over the tokens and every token the same sum over the experts. A token's
    choice is the top k of its row. The scaling adds a constant to each column of the
    logits: a per-expert bias computed from the batch. The choice has no gradient; the
    router learns through the weights, which are computed from the original logits.

    In inference the choice is the plain top k and does not depend on the rest of the
    batch. Clark et al. choose one expert per token; k > 1 is our extension.

    Args:
        num_experts: int, number of experts e.
        top_k: int, number of experts per token, k.
        iterations: int, number of Sinkhorn iterations.
        temperature: float >= 1.1e-19, applies only to the balanced matrix. Lower
            values are closer to the balanced assignment with the highest sum of logits,
            and need more iterations.
        renormalize: bool, whether the weights of the k chosen experts are divided by
            their sum. Defaults to `top_k > 1`. True with `top_k=1` supports only
            inference, as in `TopKRouter`.
        **kwargs: `use_bias`, `kernel_initializer`, `kernel_regularizer` and
            `bias_initializer` as in `TopKRouter`, and those of `keras.layers.Layer`.

    Call arguments:
        tokens: float tensor of shape `(n, d)`.
        mask: bool tensor of shape `(n,)`, False for padding. Padding and tokens with
            NaN or infinity are excluded from balancing.
        training: bool, whether the choice is balanced.

    Returns:
        A `Routing`.

    Attributes:
        kernel: variable of shape `(d, e)`.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> router = keras_moe.routers.SinkhornRouter(num_experts=4, top_k=1)
    >>> router(np.ones((3, 8)), training=True).expert_indices.shape == (3, 1)
    True

    References:
        - [Clark et al., 2022: Unified Scaling Laws for Routed Language Models](
          https://arxiv.org/abs/2202.01169), the S-BASE router
        - [Cuturi, 2013: Sinkhorn Distances: Lightspeed Computation of Optimal
          Transport](https://arxiv.org/abs/1306.0895)
    """

    supported_losses = frozenset(
        {"load_balancing", "importance", "router_z", "entropy"}
    )

    def __init__(
        self,
        num_experts: int,
        top_k: int = 2,
        *,
        iterations: int = 20,
        temperature: float = 1.0,
        renormalize: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, top_k, **kwargs)
        self.iterations = _checks.positive_int("iterations", iterations)
        self.temperature = _checks.divisor("temperature", temperature)
        self.renormalize = _scoring.checked_renormalize(renormalize, self.top_k)

    def call(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.Routing:
        if self.renormalize:
            self._check_has_gradient(training, "`renormalize` must be False")
        tokens, mask = self._prepared(tokens, mask)
        logits = self._logits(tokens)
        scores = ops.stop_gradient(logits)
        if training:
            scores = self._balanced(
                _scoring.finite_or_zero(scores), _scoring.is_valid(scores, mask)
            )
        indices = _scoring.top_k(scores, self.top_k)
        return _scoring.record(logits, indices, mask, "softmax", self.renormalize)

    def _balanced(self, scores: Any, valid: Any) -> Any:
        """Return (n, e): the scores plus the column terms of Sinkhorn's iteration.

        Computed in log space. The row terms are omitted, because they do not change the
        choice within a row.
        """
        if scores.shape[0] == 0:
            return scores  # On JAX, logsumexp fails for an empty axis.
        scores = scores / self.temperature
        # Zero in any sum; unlike -inf it stays finite if all tokens are invalid.
        absent = ops.where(valid, 0.0, -1e9)
        absent = ops.expand_dims(ops.cast(absent, scores.dtype), -1)

        def step(_: Any, by_expert: Any) -> Any:
            by_token = absent - ops.logsumexp(
                scores + by_expert, axis=-1, keepdims=True
            )
            return -ops.logsumexp(scores + by_token, axis=0, keepdims=True)

        start = ops.zeros((1, self.num_experts), dtype=scores.dtype)
        return scores + ops.fori_loop(0, self.iterations, step, start)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "iterations": self.iterations,
            "temperature": self.temperature,
            "renormalize": self.renormalize,
        }
