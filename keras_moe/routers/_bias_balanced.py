"""Load balancing by a bias instead of a loss (Wang et al. 2024; DeepSeek-V3, 2024).

Axis letters: n tokens, d input features, e experts, k choices per token, g groups of
experts.

The bias affects only the choice, and is updated from the load once per optimizer step.
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
    """Load balancing without a loss: a per-expert bias that only affects the choice.

    A token goes to the k experts with the highest `score + bias`; its combine weights
    are computed from the scores alone. After every training step the bias increases by
    `bias_update_rate` for experts below the mean load, and decreases for experts above.
    Balancing adds nothing to the gradients.

    A training step is one optimizer update. With gradient accumulation the load is
    summed over its batches, under `MirroredStrategy` over the replicas, and all of them
    are routed with the bias at the start of the step. `keras.remat` therefore
    recomputes the same choices (on JAX it fails, because Keras does not return state
    from a recomputed function). A new step is detected by a changed kernel: the router
    keeps a copy of the kernel and compares the two in every training call. An unchanged
    kernel means the same step: with a learning rate of 0, or without an optimizer, the
    bias is updated once. If `kernel.trainable` is False, every call is a step.

    Experts can be grouped (for example, by device). A token then first keeps the groups
    with the highest sum of `score + bias` of their two best experts, and chooses among
    the experts of these groups. DeepSeek-V3 sums the best k / `top_k_groups` experts
    (8 / 4 = 2); here it is two for any k.

    Args:
        num_experts: int, number of experts e.
        top_k: int, number of experts per token, k.
        score_function: "sigmoid" or "softmax".
        renormalize: bool, whether the weights of the k chosen experts are divided by
            their sum. Defaults to `top_k > 1`. True with `top_k=1` supports only
            inference, as in `TopKRouter`.
        num_groups: int, number of groups, a divisor of `num_experts`. The first group
            has experts 0 to e / g - 1, and so on.
        top_k_groups: int, number of groups per token. All by default.
        routed_scaling_factor: float > 0, factor of the weights, applied after
            renormalization.
        bias_update_rate: float in [0, 1), step size of the bias. 0 disables updates.
        **kwargs: `use_bias` (a trained bias of the logits), `kernel_initializer`,
            `kernel_regularizer` and `bias_initializer` as in `TopKRouter`, and
            those of `keras.layers.Layer`.

    Call arguments:
        tokens: float tensor of shape `(n, d)`.
        mask: bool tensor of shape `(n,)`, False for padding.
        training: bool, whether the bias is updated. It is never updated if
            `trainable` is False.

    Returns:
        A `Routing`. Its `router_probs` are the scores without the bias; "sigmoid"
        scores are divided by their sum over all experts.

    Attributes:
        kernel: variable of shape `(d, e)`.
        expert_bias: variable of shape `(e,)`, float32 and not trainable. During
            training it includes the update of the current step.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> router = keras_moe.routers.BiasBalancedRouter(
    ...     num_experts=8, top_k=2, num_groups=4, top_k_groups=2
    ... )
    >>> record = router(np.ones((3, 16)), training=True)
    >>> bias = keras.ops.convert_to_numpy(router.expert_bias)
    >>> int((bias > 0).sum()), int((bias < 0).sum())  # the chosen two have more
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
        self.top_k_groups = self.num_groups
        if top_k_groups is not None:
            self.top_k_groups = _checks.positive_int("top_k_groups", top_k_groups)
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
            aggregation="only_first_replica",  # The load is summed over all.
        )
        if self.bias_update_rate > 0.0:
            self._step = _OptimizerStep(self)

    def call(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.Routing:
        if self.renormalize:
            self._check_has_gradient(training, "`renormalize` must be False")
        tokens, mask = self._prepared(tokens, mask)
        logits = self._logits(tokens)
        scores, _ = _scoring.score(ops.stop_gradient(logits), self.score_function)
        updates = training and self.trainable and self.bias_update_rate > 0.0
        bias, load = ops.convert_to_tensor(self.expert_bias), None
        if updates:
            bias, load = self._step.start(bias, self.kernel)
        biased = _scoring.finite_or_zero(scores) + ops.cast(bias, scores.dtype)
        eligible = self._mask_other_groups(biased)
        indices = ops.cast(routing.top_k(eligible, self.top_k), "int32")
        if updates:
            self._update_bias(bias, load, indices, _scoring.is_valid(logits, mask))
        record = _scoring.record(
            logits, indices, mask, self.score_function, self.renormalize
        )
        weights = record.combine_weights * self.routed_scaling_factor
        return record._replace(combine_weights=weights)

    def _mask_other_groups(self, biased: Any) -> Any:
        """Return `biased` (n, e) with -inf outside the groups chosen by a token."""
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

    def _update_bias(self, bias: Any, load: Any, indices: Any, counted: Any) -> None:
        """b_i += rate * sign(mean load - load_i), with the load of the whole step.

        A recomputation counts its batch again. If every batch of the step is recomputed
        equally often, the loads keep their proportions and the sign does not change.
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
    """The bias at the start of the optimizer step, and the load since then.

    Keras does not notify layers of optimizer steps. A step changes the kernel, and an
    unchanged kernel means the same step: another batch of gradient accumulation, or a
    recomputation. The variables are state of the router, not weights: a new step begins
    after loading a file.
    """

    def __init__(self, router: BiasBalancedRouter) -> None:
        def state(name: str, like: Any) -> Any:
            return router.add_state(
                f"step_{name}",
                like.shape,
                # Unequal to every finite value: the first call starts a step. JAX
                # refuses NaN, which is unequal to itself, for several processes.
                initializer=keras.initializers.Constant(float("inf")),
                dtype=like.dtype,
                aggregation="only_first_replica",
            )

        self._kernel = state("kernel", router.kernel)
        self._bias = state("bias", router.expert_bias)
        self._load = state("load", router.expert_bias)
        self._moved = state("moved", router.expert_bias)

    def start(self, bias: Any, kernel: Any) -> tuple[Any, Any]:
        """Return the bias at the start of the step, and the load since then."""
        if not kernel.trainable:
            return bias, ops.zeros_like(bias)
        same = ops.logical_and(
            _are_equal(self._kernel, kernel),
            _are_equal(self._moved, bias),  # False if the user has assigned it.
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
    if top_k_groups > num_groups:
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
