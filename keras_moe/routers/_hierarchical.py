"""Hierarchical gating (Jordan & Jacobs 1994; Shazeer et al. 2017, appendix B).

Axis letters: n tokens, d input features, e experts, k choices per token, g groups of
experts, m = e / g experts per group.

A primary gate chooses groups; the secondary gate of a group chooses its experts.
"""

from __future__ import annotations

from typing import Any, ClassVar

import keras
from keras import ops

from keras_moe import _checks, routing
from keras_moe.initializers import PerExpert, independent
from keras_moe.routers import _scoring
from keras_moe.routers._base import STREAM, LinearRouter


@keras.saving.register_keras_serializable("keras_moe")
class HierarchicalRouter(LinearRouter):
    """Two levels of gates: a token chooses groups, and experts in each group.

    A primary gate chooses the top `top_k_groups` groups, and the secondary gate of each
    chosen group its top `top_k_experts` experts. Both levels apply a softmax to the
    chosen logits, and the weight of an expert is the product
    `G_primary(x)_i G_i(x)_j`: equation 12 of Shazeer et al. Unlike theirs, these gates
    have no noise in training. If all groups and experts are chosen, this is the
    two-level mixture of Jordan and Jacobs.

    The softmax over a single logit is always 1, without a gradient. For a level with
    top k = 1 the gate is therefore the softmax over all logits, as in the Switch
    Transformer, and the weights of a token sum to less than 1.

    The experts are numbered group by group: expert j of group i is
    `i * experts_per_group + j`.

    Args:
        num_groups: int, number of groups g.
        experts_per_group: int, number of experts in each group:
            `e = num_groups * experts_per_group`.
        top_k_groups: int, number of groups per token.
        top_k_experts: int, number of experts per chosen group. A token goes to
            `k = top_k_groups * top_k_experts` experts.
        **kwargs: `use_bias`, `kernel_initializer`, `kernel_regularizer` and
            `bias_initializer` as in `TopKRouter`, for both levels, and those of
            `keras.layers.Layer`.

    Call arguments:
        tokens: float tensor of shape `(n, d)`.
        mask: bool tensor of shape `(n,)`, False for padding.
        training: has no effect.

    Returns:
        A `Routing` whose choices are sorted by weight, largest first. Its
        `router_probs` are `p_i p_ij`, from the softmax over all groups and over all
        experts of a group. They are the softmax of its `router_logits`, the primary
        logit plus `log p_ij`. There is no z loss, because the logsumexp of these
        logits does not depend on the secondary logits.

    Attributes:
        kernel: variable of shape `(d, g)`, of the primary gate.
        expert_kernel: variable of shape `(g, d, e / g)`, of the secondary gates.
        bias, expert_bias: variables of shape `(g,)` and `(g, e / g)`, None without
            bias.
        num_experts: e.
        top_k: k.

    Raises:
        ValueError: if an argument is invalid.

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
        num_groups, top_k_groups = _checked_level(
            "num_groups", num_groups, "top_k_groups", top_k_groups
        )
        experts_per_group, top_k_experts = _checked_level(
            "experts_per_group", experts_per_group, "top_k_experts", top_k_experts
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
            initializer=independent(self.kernel_initializer, *STREAM, 0),
            regularizer=self.kernel_regularizer,
            autocast=False,
        )
        self.expert_kernel = self.add_weight(
            name="expert_kernel",
            shape=(groups, features, size),
            initializer=PerExpert(self.kernel_initializer, stream=(*STREAM, 1)),
            regularizer=self.kernel_regularizer,
            autocast=False,
        )
        self.bias = self.expert_bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(groups,),
                initializer=independent(self.bias_initializer, *STREAM, 2),
                autocast=False,
            )
            self.expert_bias = self.add_weight(
                name="expert_bias",
                shape=(groups, size),
                initializer=PerExpert(self.bias_initializer, stream=(*STREAM, 3)),
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
        return routing.Routing(indices, weights, joint, _scoring.softmax(joint), mask)

    def _secondary_logits(self, tokens: Any) -> Any:
        """(n, d) -> (n, g, e / g), in one matmul."""
        kernel = ops.cast(self.expert_kernel, self.precise_dtype)
        kernel = ops.transpose(kernel, (1, 0, 2))  # (d, g, e / g)
        kernel = ops.reshape(kernel, (tokens.shape[-1], self.num_experts))
        logits = ops.matmul(tokens, kernel)
        if self.expert_bias is not None:
            bias = ops.cast(self.expert_bias, self.precise_dtype)
            logits = logits + ops.reshape(bias, (-1,))
        return ops.reshape(logits, (-1, self.num_groups, self.experts_per_group))

    def _choices(self, primary: Any, secondary: Any) -> tuple[Any, Any]:
        """Return the experts (n, k) and their weights, largest weight first."""
        groups, group_weights = _top_k_gates(primary, self.top_k_groups)
        experts, expert_weights = _top_k_gates(secondary, self.top_k_experts)
        # Select the chosen groups: (n, g, m) -> (n, top_k_groups, m)
        rows = ops.expand_dims(groups, -1)
        experts = ops.take_along_axis(experts, rows, axis=1)
        expert_weights = ops.take_along_axis(expert_weights, rows, axis=1)
        indices = rows * self.experts_per_group + experts
        indices = ops.reshape(indices, (-1, self.top_k))
        weights = ops.expand_dims(group_weights, -1) * expert_weights
        weights = ops.reshape(weights, (-1, self.top_k))
        order = _scoring.top_k(weights, self.top_k)
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


def _checked_level(
    count_name: str, count: Any, top_k_name: str, top_k: Any
) -> tuple[int, int]:
    count = _checks.positive_int(count_name, count)
    top_k = _checks.positive_int(top_k_name, top_k)
    if top_k > count:
        raise ValueError(
            f"`{top_k_name}` must not exceed `{count_name}`. "
            f"Received: {top_k_name}={top_k}, {count_name}={count}"
        )
    return count, top_k


def _top_k_gates(logits: Any, k: int) -> tuple[Any, Any]:
    """Return the top k of the last axis and their gates, for one level."""
    indices = _scoring.top_k(logits, k)
    return indices, _scoring.combine_weights(
        logits, _scoring.softmax(logits), indices, "softmax", k > 1
    )


def _log_softmax(logits: Any) -> Any:
    return logits - ops.logsumexp(logits, axis=-1, keepdims=True)
