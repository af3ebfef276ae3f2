"""Dense softmax gates: the classical mixture of experts (Jacobs et al. 1991).

Axis letters: n tokens, d input features, e experts.

Each token goes to every expert, weighted by a softmax.
"""

from __future__ import annotations

from typing import Any

import keras

from keras_moe import _checks, routing
from keras_moe.routers import _scoring
from keras_moe.routers._base import LinearRouter


@keras.saving.register_keras_serializable("keras_moe")
class DenseRouter(LinearRouter):
    """Dense softmax gates: each token goes to every expert, with its gate as weight.

    Args:
        num_experts: int, number of experts e.
        temperature: float >= 1.1e-19 (which keeps quotients finite in float32),
            divisor of the logits. Values below 1 sharpen the gates, values above 1
            flatten them.
        **kwargs: `use_bias`, `kernel_initializer`, `kernel_regularizer` and
            `bias_initializer` as in `TopKRouter`, and those of `keras.layers.Layer`.

    Call arguments:
        tokens: float tensor of shape `(n, d)`.
        mask: bool tensor of shape `(n,)`, False for padding.
        training: has no effect.

    Returns:
        A `DenseRouting`. Its combine weights are its `router_probs`, the softmax of its
        `router_logits`, which are already divided by the temperature.

    Attributes:
        kernel: variable of shape `(d, e)`.
        top_k: the number of experts.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> router = keras_moe.routers.DenseRouter(num_experts=4)
    >>> router(np.ones((3, 8))).combine_weights.shape == (3, 4)
    True

    References:
        - [Jacobs et al., 1991: Adaptive Mixtures of Local Experts](
          https://doi.org/10.1162/neco.1991.3.1.79)
    """

    choice = "all"
    supported_losses = frozenset({"importance", "router_z", "entropy"})

    def __init__(
        self, num_experts: int, *, temperature: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(num_experts, num_experts, **kwargs)
        self.temperature = _checks.divisor("temperature", temperature)

    def call(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.DenseRouting:
        tokens, mask = self._prepared(tokens, mask)
        logits = self._logits(tokens) / self.temperature
        probs = _scoring.softmax(logits)
        return routing.DenseRouting(probs, logits, probs, mask)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["top_k"]
        return {**config, "temperature": self.temperature}
