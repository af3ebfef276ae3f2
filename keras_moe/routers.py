"""Routers: layers that say which experts a token goes to, and with what weight.

Axis letters: n tokens, d input features, e experts, k choices a token, c capacity
(slots an expert), g groups of experts.

A router knows neither experts nor dispatch: it turns tokens into one of the records of
`keras_moe.routing`. Its arithmetic is float32 under any dtype policy (float64 under
float64), because a choice between two near scores must not hang on half precision.
Gradients reach a router through weights, probabilities and logits, never through the
choice itself.

Tokens outside the mask are not routed, and what a record says of them has no meaning.
A token with NaN or infinite features keeps that to its own row.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_moe import _backend, _checks, routing
from keras_moe._layer import Layer
from keras_moe.initializers import PerExpert, independent

# Experts may have the same seeded initializer, and draw by other keys.
_STREAM = tuple(b"router")


class _Router(Layer):
    """What all routers share.

    Class attributes:
        choice: who chooses: "token" (`Routing`), "expert" (`ExpertChoiceRouting`) or
            "all" (`DenseRouting`).
        supported_losses: the auxiliary losses that have a meaning for the router.
            Not named `losses`, which every Keras layer has for its own.
        default_loss_weights: those that a `MoE` adds if it is not told otherwise.
    """

    choice: ClassVar[str] = "token"
    supported_losses: ClassVar[frozenset[str]] = frozenset()
    default_loss_weights: ClassVar[dict[str, float]] = {}

    def __init__(self, num_experts: int, top_k: int, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True
        self.num_experts = _checks.positive_int("num_experts", num_experts)
        self.top_k = _checks.top_k(top_k, self.num_experts)

    @property
    def _routing_dtype(self) -> str:
        return "float64" if self.compute_dtype == "float64" else "float32"

    def compute_mask(self, inputs: Any, mask: Any = None) -> None:
        """A record carries its mask, so Keras has none to pass on."""
        return None

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "top_k": self.top_k,
        }


class _LinearRouter(_Router):
    """A router whose logits are a linear function of the token."""

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        use_bias: bool = False,
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        bias_initializer: Any = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, top_k, **kwargs)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_initializer = keras.initializers.get(bias_initializer)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = _checks.last_dimension(type(self).__name__, input_shape)
        self.input_spec = keras.layers.InputSpec(ndim=2, axes={-1: features})
        # A mixed policy opens an autocast scope even where the layer forbids it, and
        # in that scope a weight without this would lose its low bits.
        self.kernel = self.add_weight(
            name="kernel",
            shape=(features, self.num_experts),
            initializer=independent(self.kernel_initializer, *_STREAM, 0),
            regularizer=self.kernel_regularizer,
            autocast=False,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.num_experts,),
                initializer=independent(self.bias_initializer, *_STREAM, 1),
                autocast=False,
            )

    def _prepared(self, tokens: Any, mask: Any) -> tuple[Any, Any]:
        """Return tokens in the dtype of routing, and the mask as bool or None.

        Padding is set to zero, so that a NaN there cannot reach a gradient.
        """
        tokens = ops.cast(tokens, self._routing_dtype)
        if mask is None:
            return tokens, None
        mask = ops.cast(mask, "bool")
        kept = ops.expand_dims(mask, -1)
        return ops.where(kept, tokens, ops.zeros_like(tokens)), mask

    def _logits(self, tokens: Any) -> Any:
        logits = ops.matmul(tokens, ops.cast(self.kernel, self._routing_dtype))
        if self.bias is not None:
            logits = logits + ops.cast(self.bias, self._routing_dtype)
        return logits

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
        }


@keras.saving.register_keras_serializable("keras_moe")
class TopKRouter(_LinearRouter):
    """Each token goes to the k experts with the highest scores.

    With softmax scores and `top_k=1` this is the router of the Switch Transformer,
    with `top_k=2` the one of Mixtral.

    Args:
        num_experts: int, number of experts e.
        top_k: int, how many experts a token goes to, k.
        score_function: "softmax" (the experts compete) or "sigmoid" (each expert is
            judged on its own).
        renormalize: bool, whether the weights of the k chosen experts are divided by
            their sum. By default they are if `top_k` > 1. With `top_k=1` the weight
            is then always 1 and the router cannot learn, so that serves for inference
            alone: training is refused unless `trainable` is False.
        jitter: float in [0, 1). In training every feature that the router sees is
            multiplied by a draw from [1 - jitter, 1 + jitter].
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
        A `Routing`. Its `router_probs` are the scores, for "sigmoid" divided by their
        sum over all experts, so that the balance losses mean the same for both.

    Attributes:
        kernel: variable of shape `(d, e)`.

    Raises:
        ValueError: if an argument breaks its rule.

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
        self.score_function = _checked_score_function(score_function)
        self.renormalize = _checked_renormalize(renormalize, self.top_k)
        self.jitter = _checks.rate("jitter", jitter)
        self.seed = seed
        if self.jitter > 0.0:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def call(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.Routing:
        if self.renormalize:
            _check_learns(self, training, "`renormalize` must be False")
        tokens, mask = self._prepared(tokens, mask)
        if training and self.jitter > 0.0:
            tokens = tokens * keras.random.uniform(
                ops.shape(tokens),
                1.0 - self.jitter,
                1.0 + self.jitter,
                dtype=self._routing_dtype,
                seed=self.seed_generator,
            )
        logits = self._logits(tokens)
        indices = _top_k(logits, self.top_k)
        return _scored(logits, indices, mask, self.score_function, self.renormalize)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "score_function": self.score_function,
            "renormalize": self.renormalize,
            "jitter": self.jitter,
            "seed": self.seed,
        }


def _checked_score_function(score_function: str) -> str:
    if score_function not in ("softmax", "sigmoid"):
        raise ValueError(
            "`score_function` must be 'softmax' or 'sigmoid'. "
            f"Received: score_function={score_function!r}"
        )
    return score_function


def _checked_renormalize(renormalize: bool | None, top_k: int) -> bool:
    if renormalize is None:
        return top_k > 1
    return _checks.flag("renormalize", renormalize)


def _check_learns(router: _Router, training: bool | None, rule: str) -> None:
    """Refuse to train a router whose one weight is always 1, which has no gradient."""
    if training and router.trainable and router.top_k == 1:
        raise ValueError(
            f"{rule} to train {type(router).__name__} with `top_k=1`: the one weight "
            "is always 1, and the router gets no gradient. Inference, and training "
            "with `router.trainable = False`, are possible. "
            f"Received: top_k=1, training={training}"
        )


def _softmax(logits: Any) -> Any:
    if logits.shape[-1] > 1:
        return ops.softmax(logits, axis=-1)
    # Keras warns of a softmax over one value. This one is 1, and its gradient 0.
    return ops.exp(logits - ops.logsumexp(logits, axis=-1, keepdims=True))


def _finite(scores: Any) -> Any:
    """Return scores that can be ordered; where NaN goes, each sort decides anew."""
    return ops.where(ops.isfinite(scores), scores, ops.zeros_like(scores))


def _top_k(scores: Any, k: int) -> Any:
    """(n, e) -> (n, k) int32 in [0, e), also for rows that are not finite."""
    scores = _finite(ops.stop_gradient(scores))
    return ops.cast(routing.top_k(scores, k), "int32")


def _scores(logits: Any, score_function: str) -> tuple[Any, Any]:
    """Return the scores (n, e), and the same as probabilities over the experts."""
    if score_function == "softmax":
        probs = _softmax(logits)
        return probs, probs
    scores = ops.sigmoid(logits)
    return scores, _shares(scores)


def _shares(scores: Any) -> Any:
    # All sigmoids of a row can underflow to 0; then so are the shares.
    return scores / (ops.sum(scores, axis=-1, keepdims=True) + 1e-20)


def _weights(
    logits: Any, scores: Any, indices: Any, score_function: str, renormalize: bool
) -> Any:
    """Return the weights (n, k) of the chosen experts."""
    if not renormalize:
        return routing.choose(scores, indices)
    if score_function == "softmax":
        # The shares of chosen softmax scores are a softmax of the chosen logits,
        # which cannot underflow.
        return _softmax(routing.choose(logits, indices))
    return _shares(routing.choose(scores, indices))


def _scored(
    logits: Any, indices: Any, mask: Any, score_function: str, renormalize: bool
) -> routing.Routing:
    scores, probs = _scores(logits, score_function)
    weights = _weights(logits, scores, indices, score_function, renormalize)
    return routing.Routing(indices, weights, logits, probs, mask)


@keras.saving.register_keras_serializable("keras_moe")
class NoisyTopKRouter(_LinearRouter):
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
            initializer=independent(self.noise_kernel_initializer, *_STREAM, 2),
            autocast=False,
        )

    def call(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.Routing:
        _check_learns(self, training, "`top_k` must be >= 2")
        tokens, mask = self._prepared(tokens, mask)
        clean = self._logits(tokens)
        if not training:
            indices = _top_k(clean, self.top_k)
            record = _scored(clean, indices, mask, "softmax", renormalize=True)
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
        best = _top_k(noisy, min(self.top_k + 1, self.num_experts))
        record = _scored(
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


@keras.saving.register_keras_serializable("keras_moe")
class BiasBalancedRouter(_LinearRouter):
    """Balance without a loss: a bias that only selects, and that follows the load.

    A token goes to the k experts with the highest `score + bias`, but its weights are
    made of the scores alone. After every training step the bias of experts with less
    than the mean load rises by `bias_update_rate`, that of experts with more falls.
    No gradient is bent towards balance.

    A training step is one update by the optimizer. With gradient accumulation the load
    is that of all its batches, under `MirroredStrategy` that of all replicas, and the
    bias with which the step began routes all of them, so that `keras.remat` recomputes
    the same choices (on JAX Keras lets no state out of what is recomputed, and fails).
    The router knows a new step by its kernel, which the optimizer has changed; where
    the kernel is not trained, every call is a step.

    Experts may stand in groups (on different devices, say): a token then first keeps
    the groups whose two best experts have the highest sum of `score + bias`, and
    chooses among the experts of these. Two is k over the groups kept in DeepSeek-V3
    (8 and 4), whose report has that quotient; here it is two for any k.

    Args:
        num_experts: int, number of experts e.
        top_k: int, how many experts a token goes to, k.
        score_function: "sigmoid" or "softmax".
        renormalize: bool, whether the weights of the k chosen experts are divided by
            their sum. By default they are if `top_k` > 1; with `top_k=1` for
            inference alone, as in `TopKRouter`.
        num_groups: int, number of groups; it divides `num_experts`. Experts 0 to
            e / g - 1 are the first group, and so on.
        top_k_groups: int, how many groups a token keeps. All by default.
        routed_scaling_factor: float > 0, the weights are multiplied by it, after they
            are renormalised if they are.
        bias_update_rate: float in [0, 1), the step of the bias. 0 keeps it as it is.
        **kwargs: `use_bias` (of the logits: it is trained), `kernel_initializer`,
            `kernel_regularizer` and `bias_initializer` as in `TopKRouter`, and what
            every Keras layer takes.

    Call arguments:
        tokens: float tensor of shape `(n, d)`.
        mask: bool tensor of shape `(n,)`, False for padding.
        training: bool, whether the bias is updated. It also is not where the layer's
            `trainable` is False.

    Returns:
        A `Routing`. Its `router_probs` are the scores without the bias, for "sigmoid"
        divided by their sum over all experts.

    Attributes:
        kernel: variable of shape `(d, e)`.
        expert_bias: variable of shape `(e,)`, float32 and not trainable. In training
            it already holds the update for the step under way.

    Raises:
        ValueError: if an argument breaks its rule.

    Example:

    >>> router = keras_moe.routers.BiasBalancedRouter(
    ...     num_experts=8, top_k=2, num_groups=4, top_k_groups=2
    ... )
    >>> record = router(np.ones((3, 16)), training=True)
    >>> bias = keras.ops.convert_to_numpy(router.expert_bias)
    >>> int((bias > 0).sum()), int((bias < 0).sum())  # the two chosen ones have more
    (6, 2)

    References:
        - [DeepSeek-AI, 2024: DeepSeek-V3 Technical Report](
          https://arxiv.org/abs/2412.19437), equations 12 to 16
        - [Wang et al., 2024: Auxiliary-Loss-Free Load Balancing Strategy for
          Mixture-of-Experts](https://arxiv.org/abs/2408.15664), algorithm 1
    """

    supported_losses = frozenset(
        {"load_balancing", "importance", "router_z", "entropy"}
    )

    def __init__(
        self,
        num_experts: int,
        top_k: int = 2,
        *,
        score_function: str = "sigmoid",
        renormalize: bool | None = None,
        num_groups: int = 1,
        top_k_groups: int | None = None,
        routed_scaling_factor: float = 1.0,
        bias_update_rate: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, top_k, **kwargs)
        self.score_function = _checked_score_function(score_function)
        self.renormalize = _checked_renormalize(renormalize, self.top_k)
        self.num_groups = _checks.positive_int("num_groups", num_groups)
        self.top_k_groups = num_groups if top_k_groups is None else top_k_groups
        _check_groups(self.num_experts, self.top_k, self.num_groups, self.top_k_groups)
        self.routed_scaling_factor = _checks.positive_number(
            "routed_scaling_factor", routed_scaling_factor
        )
        self.bias_update_rate = _checks.rate("bias_update_rate", bias_update_rate)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        super().build(input_shape)
        self.expert_bias = self.add_weight(
            name="expert_bias",
            shape=(self.num_experts,),
            initializer="zeros",
            dtype="float32",
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",  # All count the tokens of all.
        )
        if self.bias_update_rate > 0.0:
            self._step = _StepUnderWay(self.num_experts, self.kernel)

    @property
    def variables(self) -> list[Any]:
        """The weights, and what is known of a step, which JAX must hand to a call."""
        step = getattr(self, "_step", None)
        return [*super().variables, *(step.variables if step else [])]

    def call(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.Routing:
        if self.renormalize:
            _check_learns(self, training, "`renormalize` must be False")
        tokens, mask = self._prepared(tokens, mask)
        logits = self._logits(tokens)
        scores, _ = _scores(ops.stop_gradient(logits), self.score_function)
        follows = training and self.trainable and self.bias_update_rate > 0.0
        bias, load = ops.convert_to_tensor(self.expert_bias), None
        if follows:
            bias, load = self._step.began_with(bias, self.kernel)
        biased = _finite(scores) + ops.cast(bias, scores.dtype)
        eligible = self._within_best_groups(biased)
        indices = ops.cast(routing.top_k(eligible, self.top_k), "int32")
        if follows:
            self._follow_load(bias, load, indices, _valid(logits, mask))
        record = _scored(logits, indices, mask, self.score_function, self.renormalize)
        weights = record.combine_weights * self.routed_scaling_factor
        return record._replace(combine_weights=weights)

    def _within_best_groups(self, biased: Any) -> Any:
        """Return `biased` (n, e) with -inf outside the groups that a token keeps."""
        if self.top_k_groups == self.num_groups:
            return biased
        size = self.num_experts // self.num_groups
        grouped = ops.reshape(biased, (-1, size))  # (n g, e / g)
        best = routing.top_k(grouped, min(2, size))
        group_scores = ops.sum(routing.choose(grouped, best), axis=-1)
        group_scores = ops.reshape(group_scores, (-1, self.num_groups))  # (n, g)
        kept = routing.top_k(group_scores, self.top_k_groups)
        kept = ops.sum(ops.one_hot(kept, self.num_groups, dtype=biased.dtype), axis=1)
        kept = ops.repeat(kept, size, axis=-1)  # (n, e)
        return ops.where(kept > 0, biased, -float("inf"))

    def _follow_load(self, bias: Any, load: Any, indices: Any, counted: Any) -> None:
        """b_i += rate * sign(mean load - load_i), with what the step has chosen.

        A recomputation counts its batch again. As it does so for every batch of the
        step, the loads keep their proportions, and the sign is the same.
        """
        chosen = routing.expert_counts(indices, self.num_experts, counted)
        load = load + _backend.sum_over_replicas(chosen)
        change = ops.sign(ops.mean(load) - load) * self.bias_update_rate
        moved = bias + ops.cast(change, "float32")
        self.expert_bias.assign(moved)
        self._step.update(self.kernel, bias, load, moved)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "score_function": self.score_function,
            "renormalize": self.renormalize,
            "num_groups": self.num_groups,
            "top_k_groups": self.top_k_groups,
            "routed_scaling_factor": self.routed_scaling_factor,
            "bias_update_rate": self.bias_update_rate,
        }


class _StepUnderWay:
    """What a bias began the optimizer's step with, and the load since then.

    The optimizer does not tell layers that it has made a step. It changes the kernel
    though, so a kernel that still has its value belongs to the same step: a further
    batch of gradient accumulation, or a recomputation. None of this is a weight: where
    it is missing, as after loading a file, a new step begins.
    """

    def __init__(self, num_experts: int, kernel: Any) -> None:
        def variable(name: str, like: Any) -> Any:
            return keras.Variable(
                # Not equal to anything, so that the first call begins a step.
                initializer=keras.initializers.Constant(float("nan")),
                shape=like,
                dtype="float32" if name != "kernel" else kernel.dtype,
                trainable=False,
                autocast=False,
                aggregation="only_first_replica",
                name=f"step_{name}",
            )

        self._kernel = variable("kernel", kernel.shape)
        self._bias = variable("bias", (num_experts,))
        self._load = variable("load", (num_experts,))
        self._moved = variable("moved", (num_experts,))

    @property
    def variables(self) -> list[Any]:
        return [self._kernel, self._bias, self._load, self._moved]

    def began_with(self, bias: Any, kernel: Any) -> tuple[Any, Any]:
        """Return the bias at the beginning of the step, and the load since."""
        if not kernel.trainable:
            return bias, ops.zeros_like(bias)
        same = ops.logical_and(
            _are_equal(self._kernel, kernel),
            _are_equal(self._moved, bias),  # Nobody else has assigned it.
        )
        load = ops.where(same, ops.convert_to_tensor(self._load), ops.zeros_like(bias))
        return ops.where(same, ops.convert_to_tensor(self._bias), bias), load

    def update(self, kernel: Any, bias: Any, load: Any, moved: Any) -> None:
        self._kernel.assign(kernel)
        self._bias.assign(bias)
        self._load.assign(load)
        self._moved.assign(moved)


def _are_equal(first: Any, second: Any) -> Any:
    return ops.all(ops.equal(*map(ops.convert_to_tensor, (first, second))))


def _check_groups(
    num_experts: int, top_k: int, num_groups: int, top_k_groups: int
) -> None:
    if num_experts % num_groups:
        raise ValueError(
            "`num_groups` must divide `num_experts`. "
            f"Received: num_groups={num_groups}, num_experts={num_experts}"
        )
    if _checks.positive_int("top_k_groups", top_k_groups) > num_groups:
        raise ValueError(
            "`top_k_groups` must not exceed `num_groups`. "
            f"Received: top_k_groups={top_k_groups}, num_groups={num_groups}"
        )
    kept = top_k_groups * (num_experts // num_groups)
    if top_k > kept:
        raise ValueError(
            "`top_k` must not exceed the number of experts in `top_k_groups` groups. "
            f"Received: top_k={top_k}, but {top_k_groups} groups have {kept} experts"
        )


def _valid(logits: Any, mask: Any) -> Any:
    """Return (n,) bool: the tokens that are not padding and have finite logits."""
    finite = ops.all(ops.isfinite(logits), axis=-1)
    return finite if mask is None else ops.logical_and(finite, mask)


@keras.saving.register_keras_serializable("keras_moe")
class ExpertChoiceRouter(_LinearRouter):
    """Each expert chooses the tokens that score highest for it.

    The load is balanced by construction, and a token gets as many experts as want it,
    which may be none. The choice depends on the whole batch: as an expert compares
    tokens, what a token gets changes with its neighbours, in inference too, and in a
    sequence it also looks ahead.

    Args:
        num_experts: int, number of experts e.
        top_k: int, how many experts a token gets on average, k.
        capacity_factor: float > 0. An expert chooses
            `c = ceil(capacity_factor * k * n / e)` tokens (see
            `keras_moe.routing.expert_capacity`); n counts padding too, since c is part
            of a shape.
        **kwargs: `use_bias`, `kernel_initializer`, `kernel_regularizer` and
            `bias_initializer` as in `TopKRouter`, and what every Keras layer takes.

    Call arguments:
        tokens: float tensor of shape `(n, d)`.
        mask: bool tensor of shape `(n,)`, False for padding, which is never chosen.
        training: has no effect.

    Returns:
        An `ExpertChoiceRouting`. The weights are the softmax over the experts, not
        renormalised. Its `invalid` marks tokens that are not padding and whose logits
        are not finite; they are never chosen.

    Attributes:
        kernel: variable of shape `(d, e)`.

    Raises:
        ValueError: if an argument breaks its rule, or n is unknown on a backend other
            than TensorFlow.

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
        probs = _softmax(logits)
        n = ops.shape(tokens)[0]
        valid = _valid(logits, mask)
        # Below every probability, so that nobody takes these before the others.
        wanted = ops.where(ops.expand_dims(valid, -1), probs, -ops.ones_like(probs))
        if not isinstance(n, int) or n == 0:
            # An expert has at least one slot, and there may be no token for it.
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

    def _capacity(self, n: Any) -> Any:
        """`routing.expert_capacity`, where n can be known at all."""
        if not isinstance(n, int) and not ops.is_tensor(n):
            raise ValueError(
                "ExpertChoiceRouter needs the number of tokens to be known where the "
                "backend fixes every shape in advance, as a slot count follows from "
                f"it. Received tokens of shape ({n}, d)"
            )
        return routing.expert_capacity(
            n, self.num_experts, self.top_k, self.capacity_factor
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "capacity_factor": self.capacity_factor}


@keras.saving.register_keras_serializable("keras_moe")
class SinkhornRouter(_LinearRouter):
    """Top k of logits that training first balances over the experts.

    Sinkhorn's iteration scales `exp(logits / temperature)` until every expert has the
    same sum over the tokens and every token the same sum over the experts. A token's
    choice is the top k of its row. The scaling adds one number to each column of the
    logits, so it is a bias that balances this very batch. The choice has no gradient;
    the weights are made of the logits as they were, so the router learns from them.

    In inference the choice is the plain top k: an answer never depends on the rest of
    the batch. Clark et al. choose one expert a token; k > 1 is our extension.

    Args:
        num_experts: int, number of experts e.
        top_k: int, how many experts a token goes to, k.
        iterations: int, steps of the scaling.
        temperature: float > 0, of the balanced matrix only. The lower, the nearer to
            the assignment with the highest sum of logits, and the more iterations it
            takes.
        renormalize: bool, whether the weights of the k chosen experts are divided by
            their sum. By default they are if `top_k` > 1; with `top_k=1` for
            inference alone, as in `TopKRouter`.
        **kwargs: `use_bias`, `kernel_initializer`, `kernel_regularizer` and
            `bias_initializer` as in `TopKRouter`, and what every Keras layer takes.

    Call arguments:
        tokens: float tensor of shape `(n, d)`.
        mask: bool tensor of shape `(n,)`, False for padding, which does not take part
            in the balance; nor do tokens that are not finite.
        training: bool, whether the choice is balanced.

    Returns:
        A `Routing`.

    Attributes:
        kernel: variable of shape `(d, e)`.

    Raises:
        ValueError: if an argument breaks its rule.

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
        self.temperature = _checks.positive_number("temperature", temperature)
        self.renormalize = _checked_renormalize(renormalize, self.top_k)

    def call(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.Routing:
        if self.renormalize:
            _check_learns(self, training, "`renormalize` must be False")
        tokens, mask = self._prepared(tokens, mask)
        logits = self._logits(tokens)
        scores = ops.stop_gradient(logits)
        if training:
            scores = self._balanced(_finite(scores), _valid(scores, mask))
        indices = _top_k(scores, self.top_k)
        return _scored(logits, indices, mask, "softmax", self.renormalize)

    def _balanced(self, scores: Any, valid: Any) -> Any:
        """Return (n, e): the scores, plus what makes the columns' sums equal.

        All sums are of logarithms. What the iteration would add to a row is left out,
        as it changes no choice of that row.
        """
        if scores.shape[0] == 0:
            return scores  # JAX has no logsumexp over nothing.
        scores = scores / self.temperature
        # Adds nothing to a sum, and unlike -inf leaves it finite where all are invalid.
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


@keras.saving.register_keras_serializable("keras_moe")
class HashRouter(_Router):
    """Tokens are integer ids; a fixed function of the id says which experts they get.

    Nothing is learned, the weights are 1 / k. With `vocabulary_size` the function is a
    random table that gives, for each of the k choices, every expert the same number of
    ids (plus or minus one). Without, it is a hash of the id, the same on every backend
    and in every process, balanced as far as chance goes.

    Args:
        num_experts: int, number of experts e.
        top_k: int, how many different experts an id goes to, k.
        vocabulary_size: int, ids are in [0, vocabulary_size). An id outside goes where
            its remainder goes, `id mod vocabulary_size`, which is never negative.
            By default ids may be any 32-bit integers; of wider ones the low 32 bits
            count.
        seed: int >= 0, which table, or which hash.

    Call arguments:
        tokens: integer tensor of shape `(n,)` or `(n, 1)`.
        mask: bool tensor of shape `(n,)`, False for padding.
        training: has no effect.

    Returns:
        A `Routing` without logits and probabilities.

    Attributes:
        table: int32 variable of shape `(vocabulary_size, k)`, not trainable; None
            without `vocabulary_size`. It is saved with the layer's weights.

    Raises:
        ValueError: if an argument breaks its rule, or the tokens are not ids.

    Example:

    >>> router = keras_moe.routers.HashRouter(num_experts=4, vocabulary_size=1000)
    >>> router(np.array([3, 14, 159])).expert_indices.shape == (3, 1)
    True

    References:
        - [Roller et al., 2021: Hash Layers For Large Sparse Models](
          https://arxiv.org/abs/2106.04426)
    """

    # The weights of the chosen experts depend on nothing that is trained.
    supported_losses = frozenset()
    least_rank = 1

    def __init__(
        self,
        num_experts: int,
        top_k: int = 1,
        *,
        vocabulary_size: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, top_k, **kwargs)
        if vocabulary_size is not None:
            _checks.positive_int("vocabulary_size", vocabulary_size)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"`seed` must be an integer >= 0. Received: seed={seed!r}")
        self.vocabulary_size = vocabulary_size
        self.seed = seed
        self.table = None

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        if len(input_shape) != 1 and tuple(input_shape[1:]) != (1,):
            raise ValueError(
                "HashRouter expects ids of shape (n,) or (n, 1). "
                f"Received tokens of shape {tuple(input_shape)}"
            )
        if self.vocabulary_size is not None:
            self.table = self.add_weight(
                name="table",
                shape=(self.vocabulary_size, self.top_k),
                initializer=self._draw_table,
                dtype="int32",
                trainable=False,
                autocast=False,
            )

    def _draw_table(self, shape: tuple[int, int], dtype: Any = None) -> Any:
        """Draw the table: ids in random order, dealt to the experts round by round.

        In each round e ids get e different experts, and choice j is the first choice
        of another id of that round, so it is balanced as well.
        """
        rng = np.random.default_rng(self.seed)
        e = self.num_experts
        rounds = -(-shape[0] // e)
        order = rng.permuted(np.tile(np.arange(e), (rounds, 1)), axis=1)
        shifts = rng.permuted(np.tile(np.arange(e), (rounds, 1)), axis=1)
        shifts = shifts[:, : self.top_k]
        positions = (np.arange(e)[None, :, None] + shifts[:, None, :]) % e
        dealt = np.take_along_axis(order[:, :, None], positions, axis=1)
        dealt = dealt.reshape(-1, self.top_k)[: shape[0]]
        return ops.convert_to_tensor(rng.permutation(dealt), dtype="int32")

    def call(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.Routing:
        dtype = keras.backend.standardize_dtype(tokens.dtype)
        if "int" not in dtype:
            raise ValueError(
                "HashRouter expects integer ids as tokens. Hand a `MoE` the ids as "
                f"`router_inputs`. Received tokens of dtype {dtype}"
            )
        ids = ops.reshape(tokens, (-1,))
        if dtype.endswith(("8", "16")):
            ids = ops.cast(ids, "int32")  # A vocabulary may be wider than its ids.
        indices = self._hashed(ids) if self.table is None else self._looked_up(ids)
        weights = ops.ones_like(indices, dtype=self._routing_dtype) / self.top_k
        mask = None if mask is None else ops.cast(mask, "bool")
        return routing.Routing(indices, weights, mask=mask)

    def _looked_up(self, ids: Any) -> Any:
        return ops.take(self.table, ops.mod(ids, self.vocabulary_size), axis=0)

    def _hashed(self, ids: Any) -> Any:
        """(n,) -> (n, k): k different experts an id, by Floyd's sampling.

        Choice j is drawn from e - k + j + 1 experts; if an earlier choice has it, the
        last of these is taken, which no earlier one can have. In the end all are moved
        on by one more draw, so that each choice is uniform over the experts.
        """
        ids = ops.cast(ids, "int32")
        chosen: list[Any] = []
        for j in range(self.top_k):
            last = self.num_experts - self.top_k + j
            draw = ops.mod(_mixed(ids, self.seed, j), last + 1)
            for earlier in chosen[:j]:
                draw = ops.where(earlier == draw, last, draw)
            chosen.append(draw)
        shift = ops.expand_dims(_mixed(ids, self.seed, self.top_k), -1)
        shift = ops.mod(shift, self.num_experts)
        return ops.mod(ops.stack(chosen, axis=-1) + shift, self.num_experts)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "seed": self.seed,
        }


def _mixed(ids: Any, *key: int) -> Any:
    """Return int32 in [0, 2^31) that look like independent draws for every id and key.

    A Feistel network on the 16-bit halves of an id. Its products stay below 2^31, so
    that every backend computes the same without unsigned or 64-bit integers.
    """
    state = np.random.SeedSequence(key).generate_state(12, dtype=np.uint32)
    left = ops.bitwise_and(ops.right_shift(ids, 16), 0xFFFF)
    right = ops.bitwise_and(ids, 0xFFFF)
    for factor, offset in state.reshape(6, 2).tolist():
        # Odd, and large enough to move low bits of the half to high ones.
        factor = factor % 2**14 + 2**14 - 1 | 1
        product = right * factor + offset % 2**15
        product = ops.bitwise_xor(product, ops.right_shift(product, 15))
        left, right = right, ops.bitwise_xor(left, ops.bitwise_and(product, 0xFFFF))
    return ops.bitwise_and(left, 0x7FFF) * 0x10000 + right


@keras.saving.register_keras_serializable("keras_moe")
class DenseRouter(_LinearRouter):
    """Each token goes to every expert, with softmax gates: the classical mixture.

    Args:
        num_experts: int, number of experts e.
        temperature: float > 0, the logits are divided by it: below 1 sharpens the
            gates, above 1 evens them out.
        **kwargs: `use_bias`, `kernel_initializer`, `kernel_regularizer` and
            `bias_initializer` as in `TopKRouter`, and what every Keras layer takes.

    Call arguments:
        tokens: float tensor of shape `(n, d)`.
        mask: bool tensor of shape `(n,)`, False for padding.
        training: has no effect.

    Returns:
        A `DenseRouting`, whose weights are its `router_probs`, the softmax of its
        `router_logits`. These are divided by the temperature already.

    Attributes:
        kernel: variable of shape `(d, e)`.
        top_k: the number of experts.

    Raises:
        ValueError: if an argument breaks its rule.

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
        self.temperature = _checks.positive_number("temperature", temperature)

    def call(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.DenseRouting:
        tokens, mask = self._prepared(tokens, mask)
        logits = self._logits(tokens) / self.temperature
        probs = _softmax(logits)
        return routing.DenseRouting(probs, logits, probs, mask)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["top_k"]
        return {**config, "temperature": self.temperature}


@keras.saving.register_keras_serializable("keras_moe")
class HierarchicalRouter(_LinearRouter):
    """Two levels of gates: a token chooses groups of experts, and experts in each.

    A primary gate keeps the `top_k_groups` best groups, in each of which a secondary
    gate of its own keeps the `top_k_experts` best experts. At both levels the kept
    logits go through a softmax, and the weight of an expert is the product
    `G_primary(x)_i G_i(x)_j`: equation 12 of Shazeer et al. Their gates have noise
    in training, these have not. If everything is kept, this is the mixture of Jordan
    and Jacobs with two levels.

    A level that keeps only one would give it the gate 1, whatever its logit, and never
    learn. The gate is then the softmax over all, as in the Switch Transformer, and the
    weights of a token sum to less than 1.

    The experts are numbered group by group: expert j of group i is
    `i * experts_per_group + j`.

    Args:
        num_groups: int, number of groups g.
        experts_per_group: int, number of experts in each, so that there are
            `e = num_groups * experts_per_group`.
        top_k_groups: int, how many groups a token keeps.
        top_k_experts: int, how many experts it keeps in each of them. A token then
            goes to `k = top_k_groups * top_k_experts` experts.
        **kwargs: `use_bias`, `kernel_initializer`, `kernel_regularizer` and
            `bias_initializer` as in `TopKRouter`, here of both levels, and what every
            Keras layer takes.

    Call arguments:
        tokens: float tensor of shape `(n, d)`.
        mask: bool tensor of shape `(n,)`, False for padding.
        training: has no effect.

    Returns:
        A `Routing` whose choices stand in the order of their weights. Its
        `router_probs` are `p_i p_ij`, from the softmax over all groups and over all
        experts of a group. They are the softmax of its `router_logits`, the primary
        logit plus `log p_ij`. A z loss of these would not see the size of the
        secondary logits and is not offered.

    Attributes:
        kernel: variable of shape `(d, g)`, of the primary gate.
        expert_kernel: variable of shape `(g, d, e / g)`, of the secondary gates.
        bias, expert_bias: variables of shape `(g,)` and `(g, e / g)`, None without
            bias.
        num_experts: e.
        top_k: k.

    Raises:
        ValueError: if an argument breaks its rule.

    Example:

    >>> router = keras_moe.routers.HierarchicalRouter(num_groups=4, experts_per_group=8)
    >>> record = router(np.ones((3, 16)))
    >>> record.expert_indices.shape == (3, 4), record.router_probs.shape == (3, 32)
    (True, True)

    References:
        - [Shazeer et al., 2017: Outrageously Large Neural Networks: The Sparsely-Gated
          Mixture-of-Experts Layer](https://arxiv.org/abs/1701.06538), appendix B
        - [Jordan and Jacobs, 1994: Hierarchical Mixtures of Experts and the EM
          Algorithm](https://doi.org/10.1162/neco.1994.6.2.181)
    """

    supported_losses = frozenset({"load_balancing", "importance", "entropy"})
    default_loss_weights: ClassVar[dict[str, float]] = {"load_balancing": 0.01}

    def __init__(
        self,
        num_groups: int,
        experts_per_group: int,
        top_k_groups: int = 2,
        top_k_experts: int = 2,
        **kwargs: Any,
    ) -> None:
        _check_level("top_k_groups", top_k_groups, "num_groups", num_groups)
        _check_level(
            "top_k_experts", top_k_experts, "experts_per_group", experts_per_group
        )
        super().__init__(
            num_groups * experts_per_group, top_k_groups * top_k_experts, **kwargs
        )
        self.num_groups = num_groups
        self.experts_per_group = experts_per_group
        self.top_k_groups = top_k_groups
        self.top_k_experts = top_k_experts

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = _checks.last_dimension(type(self).__name__, input_shape)
        self.input_spec = keras.layers.InputSpec(ndim=2, axes={-1: features})
        groups, size = self.num_groups, self.experts_per_group
        self.kernel = self.add_weight(
            name="kernel",
            shape=(features, groups),
            initializer=independent(self.kernel_initializer, *_STREAM, 0),
            regularizer=self.kernel_regularizer,
            autocast=False,
        )
        self.expert_kernel = self.add_weight(
            name="expert_kernel",
            shape=(groups, features, size),
            initializer=PerExpert(self.kernel_initializer, stream=(*_STREAM, 1)),
            regularizer=self.kernel_regularizer,
            autocast=False,
        )
        self.bias = self.expert_bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(groups,),
                initializer=independent(self.bias_initializer, *_STREAM, 2),
                autocast=False,
            )
            self.expert_bias = self.add_weight(
                name="expert_bias",
                shape=(groups, size),
                initializer=PerExpert(self.bias_initializer, stream=(*_STREAM, 3)),
                autocast=False,
            )

    def call(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.Routing:
        tokens, mask = self._prepared(tokens, mask)
        primary = self._logits(tokens)  # (n, g)
        secondary = self._secondary_logits(tokens)  # (n, g, e / g)
        indices, weights = self._choices(primary, secondary)
        joint = ops.expand_dims(primary, -1) + _log_softmax(secondary)
        joint = ops.reshape(joint, (-1, self.num_experts))
        return routing.Routing(indices, weights, joint, _softmax(joint), mask)

    def _secondary_logits(self, tokens: Any) -> Any:
        """(n, d) -> (n, g, e / g), in one matmul."""
        kernel = ops.cast(self.expert_kernel, self._routing_dtype)
        kernel = ops.transpose(kernel, (1, 0, 2))  # (d, g, e / g)
        kernel = ops.reshape(kernel, (tokens.shape[-1], self.num_experts))
        logits = ops.matmul(tokens, kernel)
        if self.expert_bias is not None:
            bias = ops.cast(self.expert_bias, self._routing_dtype)
            logits = logits + ops.reshape(bias, (-1,))
        return ops.reshape(logits, (-1, self.num_groups, self.experts_per_group))

    def _choices(self, primary: Any, secondary: Any) -> tuple[Any, Any]:
        """Return the experts (n, k) and their weights, the largest weight first."""
        groups, group_weights = _kept(primary, self.top_k_groups)
        experts, expert_weights = _kept(secondary, self.top_k_experts)
        # Of all groups, those that were kept: (n, g, m) -> (n, top_k_groups, m)
        rows = ops.expand_dims(groups, -1)
        experts = ops.take_along_axis(experts, rows, axis=1)
        expert_weights = ops.take_along_axis(expert_weights, rows, axis=1)
        indices = rows * self.experts_per_group + experts
        indices = ops.reshape(indices, (-1, self.top_k))
        weights = ops.expand_dims(group_weights, -1) * expert_weights
        weights = ops.reshape(weights, (-1, self.top_k))
        order = _top_k(weights, self.top_k)
        return routing.choose(indices, order), routing.choose(weights, order)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["num_experts"], config["top_k"]
        return {
            **config,
            "num_groups": self.num_groups,
            "experts_per_group": self.experts_per_group,
            "top_k_groups": self.top_k_groups,
            "top_k_experts": self.top_k_experts,
        }


def _check_level(top_k_name: str, top_k: Any, count_name: str, count: Any) -> None:
    _checks.positive_int(count_name, count)
    if _checks.positive_int(top_k_name, top_k) > count:
        raise ValueError(
            f"`{top_k_name}` must not exceed `{count_name}`. "
            f"Received: {top_k_name}={top_k}, {count_name}={count}"
        )


def _kept(logits: Any, k: int) -> tuple[Any, Any]:
    """Return the k best of the last axis and their gates, those of one level."""
    indices = _top_k(logits, k)
    return indices, _weights(logits, _softmax(logits), indices, "softmax", k > 1)


def _log_softmax(logits: Any) -> Any:
    return logits - ops.logsumexp(logits, axis=-1, keepdims=True)


KNOWN: dict[str, type[_Router]] = {
    "top_k": TopKRouter,
    "noisy_top_k": NoisyTopKRouter,
    "bias_balanced": BiasBalancedRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
    "sinkhorn": SinkhornRouter,
    "dense": DenseRouter,
}
