"""Top-k routing (Shazeer et al. 2017, Fedus et al. 2021).

Axis letters: n tokens, d input features, e experts, k choices per token.

Each token goes to the k experts with the highest scores, weighted by the scores.
"""

from __future__ import annotations

from typing import Any, ClassVar

import keras
from keras import ops

from keras_moe import _checks, routing
from keras_moe.routers import _scoring
from keras_moe.routers._base import LinearRouter


@keras.saving.register_keras_serializable("keras_moe")
class TopKRouter(LinearRouter):
    """Each token goes to the k experts with the highest scores.

    With softmax scores, `top_k=1` is the router of the Switch Transformer, `top_k=2`
    that of Mixtral.

    Args:
        num_experts: int, number of experts e.
        top_k: int, number of experts per token, k.
        score_function: "softmax" (the experts compete) or "sigmoid" (each expert is
            scored independently).
        renormalize: bool, whether the weights of the k chosen experts are divided by
            their sum. Defaults to `top_k > 1`. True with `top_k=1` gives a constant
            weight of 1 without a gradient: training raises ValueError unless
            `trainable` is False.
        jitter: float in [0, 1). In training every feature of the router's inputs is
            multiplied by a uniform sample from [1 - jitter, 1 + jitter].
        use_bias: bool, whether the logits have a bias.
        kernel_initializer: initializer of the kernel.
        kernel_regularizer: regularizer of the kernel.
        bias_initializer: initializer of the bias.
        seed: int, the seed of the jitter.

    Call arguments:
        tokens: float tensor of shape `(n, d)`.
        mask: bool tensor of shape `(n,)`, False for padding.
        training: bool, whether the jitter is active.

    Returns:
        A `Routing`. Its `router_probs` are the scores; "sigmoid" scores are divided by
        their sum over all experts, which makes auxiliary losses comparable.

    Attributes:
        kernel: variable of shape `(d, e)`.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> router = keras_moe.routers.TopKRouter(num_experts=4, top_k=2)
    >>> record = router(np.ones((3, 8)))
    >>> record.expert_indices.shape == (3, 2), record.router_probs.shape == (3, 4)
    (True, True)

    References:
        - [Shazeer et al., 2017: Outrageously Large Neural Networks: The Sparsely-Gated
          Mixture-of-Experts Layer](https://arxiv.org/abs/1701.06538)
        - [Fedus et al., 2021: Switch Transformers: Scaling to Trillion Parameter Models
          with Simple and Efficient Sparsity](https://arxiv.org/abs/2101.03961)
    """

    supported_losses = frozenset(
        {"load_balancing", "importance", "router_z", "entropy"}
    )
    default_loss_weights: ClassVar[dict[str, float]] = {"load_balancing": 0.01}

    def __init__(
        self,
        num_experts: int,
        top_k: int = 2,
        *,
        score_function: str = "softmax",
        renormalize: bool | None = None,
        jitter: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, top_k, **kwargs)
        self.score_function = _scoring.checked_score_function(score_function)
        self.renormalize = _scoring.checked_renormalize(renormalize, self.top_k)
        self.jitter = _checks.rate("jitter", jitter)
        self.seed = _checks.seed(seed)
        if self.jitter > 0.0:
            self.seed_generator = keras.random.SeedGenerator(self.seed)

    def call(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.Routing:
        if self.renormalize:
            self._check_has_gradient(training, "`renormalize` must be False")
        tokens, mask = self._prepared(tokens, mask)
        if training and self.jitter > 0.0:
            tokens = tokens * keras.random.uniform(
                ops.shape(tokens),
                1.0 - self.jitter,
                1.0 + self.jitter,
                dtype=self.precise_dtype,
                seed=self.seed_generator,
            )
        logits = self._logits(tokens)
        indices = _scoring.top_k(logits, self.top_k)
        return _scoring.record(
            logits, indices, mask, self.score_function, self.renormalize
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "score_function": self.score_function,
            "renormalize": self.renormalize,
            "jitter": self.jitter,
            "seed": self.seed,
        }
