"""Balance by a bias instead of a loss (Wang et al. 2024; DeepSeek-V3, 2024).

Axis letters: n tokens, d input features, e experts, k choices a token, g groups of
experts.

The bias takes part in the choice alone, and follows the load once an optimizer step.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import _backend, _checks, routing
from keras_moe.routers import _scoring
from keras_moe.routers._base import LinearRouter


@keras.saving.register_keras_serializable("keras_moe")
class BiasBalancedRouter(LinearRouter):
    """Balance without a loss: a bias that only selects, and that follows the load.

    A token goes to the k experts with the highest `score + bias`, but its weights are
    made of the scores alone. After every training step the bias of experts with less
    than the mean load rises by `bias_update_rate`, that of experts with more falls.
    Balance adds nothing to any gradient.

    A training step is one update by the optimizer. With gradient accumulation the load
    is that of all its batches, under `MirroredStrategy` that of all replicas, and the
    bias with which the step began routes all of them, so that `keras.remat` recomputes
    the same choices (on JAX Keras lets no state out of what is recomputed, and fails).
    A new step is recognised by the kernel, which the optimizer has changed. The router
    keeps a copy of it, and compares the two in every call of training. An unchanged
    kernel means the same step: with a learning rate of 0, or without an optimizer, the
    bias moves once. Where `kernel.trainable` is False, every call is a step.

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
            it already holds the update of the current step.

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
        self.score_function = _scoring.checked_score_function(score_function)
        self.renormalize = _scoring.checked_renormalize(renormalize, self.top_k)
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
            self._step = _OptimizerStep(self.num_experts, self.kernel)

    @property
    def variables(self) -> list[Any]:
        """The weights, and the state of a step, which JAX must pass to a call."""
        step = getattr(self, "_step", None)
        return [*super().variables, *(step.variables if step else [])]

    def call(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.Routing:
        if self.renormalize:
            self._check_learns(training, "`renormalize` must be False")
        tokens, mask = self._prepared(tokens, mask)
        logits = self._logits(tokens)
        scores, _ = _scoring.score(ops.stop_gradient(logits), self.score_function)
        follows = training and self.trainable and self.bias_update_rate > 0.0
        bias, load = ops.convert_to_tensor(self.expert_bias), None
        if follows:
            bias, load = self._step.began_with(bias, self.kernel)
        biased = _scoring.finite_or_zero(scores) + ops.cast(bias, scores.dtype)
        eligible = self._within_best_groups(biased)
        indices = ops.cast(routing.top_k(eligible, self.top_k), "int32")
        if follows:
            self._follow_load(bias, load, indices, _scoring.is_valid(logits, mask))
        record = _scoring.record(
            logits, indices, mask, self.score_function, self.renormalize
        )
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

        A recomputation counts its batch again. Where every batch of the step is
        recomputed equally often, the loads keep their proportions, and the sign is the
        same.
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


class _OptimizerStep:
    """The bias at the beginning of the optimizer's step, and the load since then.

    Keras does not notify layers of an optimizer's step. A step changes the kernel, so a
    kernel that still has its value belongs to the same step: a further batch of
    gradient accumulation, or a recomputation. These variables are not weights: where
    they are missing, as after loading a file, a new step begins.
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
            _are_equal(self._moved, bias),  # Not assigned from outside.
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
