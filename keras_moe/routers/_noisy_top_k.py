"""Noisy top-k routing (Shazeer et al. 2017, section 2.1 and appendix A).

Axis letters: n tokens, d input features, e experts, k choices per token.

Training adds noise with a learned scale to the logits, which makes the load of an
expert differentiable.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import keras
from keras import ops

from keras_moe import _checks, routing
from keras_moe.initializers import independent
from keras_moe.routers import _scoring
from keras_moe.routers._base import STREAM, LinearRouter


@keras.saving.register_keras_serializable("keras_moe")
class NoisyTopKRouter(LinearRouter):
    """Top-k routing with learned Gaussian noise on the logits in training.

    `H(x) = x W_g + N(0, 1) softplus(x W_noise)`, and the gates are the softmax of the k
    largest entries of H: equations 3 to 5 of Shazeer et al. The noise explores experts
    with logits close to the top k, and makes the load of an expert differentiable, as
    the load loss requires.

    The paper initializes both kernels to zero, here only the noise kernel is zero: with
    a zero gate kernel and no noise every token would go to the same experts.

    Args:
        num_experts: int, number of experts e.
        top_k: int, number of experts per token, k. The softmax over a single logit is
            always 1: training with `top_k=1` raises ValueError unless `trainable` is
            False.
        noise_kernel_initializer: initializer of the noise kernel. With zeros the
            initial scale of the noise is `softplus(0)`, about 0.69, for all tokens.
        seed: int, the seed of the noise.
        **kwargs: `use_bias`, `kernel_initializer`, `kernel_regularizer` and
            `bias_initializer` as in `TopKRouter`, and those of `keras.layers.Layer`.

    Call arguments:
        tokens: float tensor of shape `(n, d)`.
        mask: bool tensor of shape `(n,)`, False for padding.
        training: bool, whether noise is added.

    Returns:
        A `Routing`. Its `router_logits` are H, its `router_probs` their softmax over
        all experts. In training `choice_probs` are the P of appendix A: the
        probability that a token chooses an expert if only its noise for that expert is
        resampled. In inference, without noise, they are 1 for the chosen experts and 0
        for the others.

    Attributes:
        kernel: variable of shape `(d, e)`, W_g.
        noise_kernel: variable of shape `(d, e)`, W_noise.

    Raises:
        ValueError: if an argument is invalid.

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
        self.noise_kernel_initializer = _checks.initializer(
            "noise_kernel_initializer", noise_kernel_initializer
        )
        self.seed = _checks.seed(seed)
        self.seed_generator = keras.random.SeedGenerator(self.seed)

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
        self._check_has_gradient(training, "`top_k` must be >= 2")
        tokens, mask = self._prepared(tokens, mask)
        clean = self._logits(tokens)
        if not training:
            indices = _scoring.top_k(clean, self.top_k)
            record = _scoring.record(clean, indices, mask, "softmax", renormalize=True)
            weights = ops.ones_like(record.combine_weights)
            chosen = routing.gates(
                record._replace(combine_weights=weights),
                self.num_experts,
                ops.shape(clean)[0],
            )
            return record._replace(choice_probs=chosen)
        scale = ops.softplus(
            ops.matmul(tokens, ops.cast(self.noise_kernel, self.precise_dtype))
        )
        noise = keras.random.normal(
            ops.shape(clean), dtype=self.precise_dtype, seed=self.seed_generator
        )
        noisy = clean + noise * scale
        # k + 1 logits: the (k+1)-th is the threshold for the chosen experts.
        best = _scoring.top_k(noisy, min(self.top_k + 1, self.num_experts))
        record = _scoring.record(
            noisy, best[:, : self.top_k], mask, "softmax", renormalize=True
        )
        return record._replace(
            choice_probs=self._choice_probs(clean, noisy, scale, best)
        )

    def _choice_probs(self, clean: Any, noisy: Any, scale: Any, best: Any) -> Any:
        """P(x, i) of appendix A; the gradient also flows through the thresholds."""
        if self.top_k == self.num_experts:
            return ops.ones_like(clean)
        values = routing.choose(noisy, best)
        last, next_one = values[:, -2:-1], values[:, -1:]
        # kth_excluding(H, k, i): the (k+1)-th logit if i is chosen, else the k-th.
        threshold = ops.where(noisy > next_one, next_one, last)
        # softplus underflows to 0 below -100, and clean - threshold can be 0.
        deviations = (clean - threshold) / ops.maximum(scale, 1e-10)
        return 0.5 * (1.0 + ops.erf(deviations / math.sqrt(2.0)))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "noise_kernel_initializer": keras.initializers.serialize(
                self.noise_kernel_initializer
            ),
            "seed": self.seed,
        }
