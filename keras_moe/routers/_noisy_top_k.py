"""Noisy top-k routing (Shazeer et al. 2017, section 2.1 and appendix A).

Axis letters: n tokens, d input features, e experts, k choices a token.

Training adds noise of a learned size to the logits, so that the load of an expert is a
smooth function and can be a loss.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import keras
from keras import ops

from keras_moe import routing
from keras_moe.initializers import independent
from keras_moe.routers import _scoring
from keras_moe.routers._base import STREAM, LinearRouter


@keras.saving.register_keras_serializable("keras_moe")
class NoisyTopKRouter(LinearRouter):
    """Top k of logits to which training adds noise of a learned size.

    `H(x) = x W_g + N(0, 1) softplus(x W_noise)`, and the gates are the softmax of the k
    largest entries of H: equations 3 to 5 of Shazeer et al. The noise lets experts near
    the border of a choice be tried, and makes the load of an expert smooth, so that
    it can be a loss.

    The paper starts both kernels at zero. Here only the noise kernel does: with a zero
    gate kernel and without noise every token would go to the same experts.

    Args:
        num_experts: int, number of experts e.
        top_k: int, how many experts a token goes to, k. The softmax over a single
            kept logit is always 1, so `top_k=1` serves for inference alone: training
            is refused unless `trainable` is False.
        noise_kernel_initializer: initializer of the kernel of the noise. With zeros
            its size is `softplus(0)`, about 0.69, for all tokens at the start.
        seed: int, the seed of the noise.
        **kwargs: `use_bias`, `kernel_initializer`, `kernel_regularizer` and
            `bias_initializer` as in `TopKRouter`, and what every Keras layer takes.

    Call arguments:
        tokens: float tensor of shape `(n, d)`.
        mask: bool tensor of shape `(n,)`, False for padding.
        training: bool, whether noise is added.

    Returns:
        A `Routing`. Its `router_logits` are H, its `router_probs` their softmax over
        all experts. In training `choice_probs` are the P of appendix A: the
        probability that a token chooses an expert if its noise for that expert alone
        is drawn anew. In inference, without noise, they are 1 for the chosen experts
        and 0 for the others.

    Attributes:
        kernel: variable of shape `(d, e)`, W_g.
        noise_kernel: variable of shape `(d, e)`, W_noise.

    Raises:
        ValueError: if an argument breaks its rule.

    Example:

    >>> router = keras_moe.routers.NoisyTopKRouter(num_experts=4, top_k=2)
    >>> router(np.ones((3, 8)), training=True).choice_probs.shape == (3, 4)
    True

    References:
        - [Shazeer et al., 2017: Outrageously Large Neural Networks: The Sparsely-Gated
          Mixture-of-Experts Layer](https://arxiv.org/abs/1701.06538), section 2.1 and
          appendix A
    """

    supported_losses = frozenset(
        {"load_balancing", "importance", "load", "router_z", "entropy"}
    )
    default_loss_weights: ClassVar[dict[str, float]] = {"importance": 0.1, "load": 0.1}

    def __init__(
        self,
        num_experts: int,
        top_k: int = 2,
        *,
        noise_kernel_initializer: Any = "zeros",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, top_k, **kwargs)
        self.noise_kernel_initializer = keras.initializers.get(noise_kernel_initializer)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        super().build(input_shape)
        self.noise_kernel = self.add_weight(
            name="noise_kernel",
            shape=(input_shape[-1], self.num_experts),
            initializer=independent(self.noise_kernel_initializer, *STREAM, 2),
            autocast=False,
        )

    def call(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.Routing:
        self._check_learns(training, "`top_k` must be >= 2")
        tokens, mask = self._prepared(tokens, mask)
        clean = self._logits(tokens)
        if not training:
            indices = _scoring.top_k(clean, self.top_k)
            record = _scoring.record(clean, indices, mask, "softmax", renormalize=True)
            chosen = ops.one_hot(indices, self.num_experts, dtype=clean.dtype)
            return record._replace(choice_probs=ops.sum(chosen, axis=1))
        scale = ops.softplus(
            ops.matmul(tokens, ops.cast(self.noise_kernel, self._routing_dtype))
        )
        noise = keras.random.normal(
            ops.shape(clean), dtype=self._routing_dtype, seed=self.seed_generator
        )
        noisy = clean + noise * scale
        # One more than is chosen: the next one is the bar for those that are.
        best = _scoring.top_k(noisy, min(self.top_k + 1, self.num_experts))
        record = _scoring.record(
            noisy, best[:, : self.top_k], mask, "softmax", renormalize=True
        )
        return record._replace(
            choice_probs=self._choice_probs(clean, noisy, scale, best)
        )

    def _choice_probs(self, clean: Any, noisy: Any, scale: Any, best: Any) -> Any:
        """P(x, i) of appendix A; its gradient also flows through the bars."""
        if self.top_k == self.num_experts:
            return ops.ones_like(clean)
        values = routing.choose(noisy, best)
        last, next_one = values[:, -2:-1], values[:, -1:]
        # kth_excluding(H, k, i): without a chosen i, the one after it moves up.
        bar = ops.where(noisy > next_one, next_one, last)
        # softplus underflows to 0 below -100, and a clean logit can lie on its bar.
        deviations = (clean - bar) / ops.maximum(scale, 1e-10)
        return 0.5 * (1.0 + ops.erf(deviations / math.sqrt(2.0)))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "noise_kernel_initializer": keras.initializers.serialize(
                self.noise_kernel_initializer
            ),
            "seed": self.seed,
        }
