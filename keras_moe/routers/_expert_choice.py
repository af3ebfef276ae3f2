"""Expert choice routing (Zhou et al. 2022).

Axis letters: n tokens, d input features, e experts, k choices per token on average, c
capacity (slots per expert).

Each expert chooses its c tokens with the highest scores.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks, routing
from keras_moe.routers import _scoring
from keras_moe.routers._base import LinearRouter


@keras.saving.register_keras_serializable("keras_moe")
class ExpertChoiceRouter(LinearRouter):
    """Each expert chooses its c tokens with the highest scores.

    The load is balanced by construction. A token may be chosen by any number of
    experts, including none. The choice depends on the whole batch, in inference too:
    the experts of a token depend on the other tokens, including later tokens of a
    sequence (it is not causal).

    Args:
        num_experts: int, number of experts e.
        top_k: int, mean number of experts per token, k.
        capacity_factor: float > 0. An expert chooses
            `c = ceil(capacity_factor * k * n / e)` tokens (see
            `keras_moe.routing.expert_capacity`); n includes padding, because c must be
            a static size.
        **kwargs: `use_bias`, `kernel_initializer`, `kernel_regularizer` and
            `bias_initializer` as in `TopKRouter`, and those of `keras.layers.Layer`.

    Call arguments:
        tokens: float tensor of shape `(n, d)`.
        mask: bool tensor of shape `(n,)`, False for padding, which is never chosen.
        training: has no effect.

    Returns:
        An `ExpertChoiceRouting`. The weights are the softmax over the experts, without
        renormalization. `invalid` marks tokens, padding excluded, whose logits are not
        finite; they are never chosen.

    Attributes:
        kernel: variable of shape `(d, e)`.

    Raises:
        ValueError: if an argument is invalid, or n is unknown on a backend other than
            TensorFlow.

    Example:

    >>> router = keras_moe.routers.ExpertChoiceRouter(num_experts=4, top_k=2)
    >>> router(np.ones((6, 8))).token_indices.shape == (4, 3)
    True

    References:
        - [Zhou et al., 2022: Mixture-of-Experts with Expert Choice Routing](
          https://arxiv.org/abs/2202.09368)
    """

    choice = "expert"
    supported_losses = frozenset({"importance", "router_z", "entropy"})

    def __init__(
        self,
        num_experts: int,
        top_k: int = 2,
        *,
        capacity_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, top_k, **kwargs)
        self.capacity_factor = _checks.positive_number(
            "capacity_factor", capacity_factor
        )

    def call(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.ExpertChoiceRouting:
        tokens, mask = self._prepared(tokens, mask)
        logits = self._logits(tokens)
        probs = _scoring.softmax(logits)
        n = ops.shape(tokens)[0]
        valid = _scoring.is_valid(logits, mask)
        # -1 is below every probability: invalid tokens come last.
        wanted = ops.where(ops.expand_dims(valid, -1), probs, -ops.ones_like(probs))
        if not isinstance(n, int) or n == 0:
            # An expert has at least one slot, but the batch may be empty.
            wanted = ops.pad(wanted, ((0, 1), (0, 0)), constant_values=-1.0)
        wanted = ops.transpose(wanted)  # (e, n)
        values, indices = _backend.top_k(wanted, self._capacity(n))  # (e, c)
        filled = values >= 0.0
        invalid = ops.logical_not(ops.all(ops.isfinite(logits), axis=-1))
        return routing.ExpertChoiceRouting(
            ops.where(filled, ops.cast(indices, "int32"), ops.cast(n, "int32")),
            ops.where(filled, values, ops.zeros_like(values)),
            logits,
            probs,
            mask,
            invalid if mask is None else ops.logical_and(invalid, mask),
        )

    def compute_output_spec(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.ExpertChoiceRouting:
        """Return the output shapes, also for a data-dependent n."""
        n = tokens.shape[0]
        c = None if n is None else self._capacity(n)
        by_expert, by_token = (self.num_experts, c), (n, self.num_experts)
        dtype = self.precise_dtype
        return routing.ExpertChoiceRouting(
            keras.KerasTensor(by_expert, "int32"),
            keras.KerasTensor(by_expert, dtype),
            keras.KerasTensor(by_token, dtype),
            keras.KerasTensor(by_token, dtype),
            None if mask is None else keras.KerasTensor((n,), "bool"),
            keras.KerasTensor((n,), "bool"),
        )

    def _capacity(self, n: Any) -> Any:
        """`routing.expert_capacity`; raises ValueError if n is not known."""
        if not isinstance(n, int) and not ops.is_tensor(n):
            raise ValueError(
                "ExpertChoiceRouter needs the number of tokens to be known on backends "
                "with static shapes, because it determines the number of slots. "
                f"Received tokens of shape ({n}, d)"
            )
        return routing.expert_capacity(
            n, self.num_experts, self.top_k, self.capacity_factor
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "capacity_factor": self.capacity_factor}
