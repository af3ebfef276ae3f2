"""Sparse mixture of experts with two levels of gates: groups, and experts in them.

Expert j of group i has the weight G_primary(x)_i G_i(x)_j (Shazeer et al. 2017,
appendix B, equation 12).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_moe import routers
from keras_moe.layers._parts import layer_name
from keras_moe.layers.moe import MoE


@keras.saving.register_keras_serializable("keras_moe")
class HierarchicalMoE(MoE):
    """Sparse Mixture-of-Experts with two levels of gates: groups, then experts.

    A `MoE` with a `keras_moe.routers.HierarchicalRouter`. With many experts, each gate
    still has few outputs.

    Args:
        num_groups: int, number of groups g.
        experts_per_group: int, experts in each group; in total there are
            `e = num_groups * experts_per_group`.
        expert_units: int or sequence of ints, the widths of an expert's layers. None
            if `experts` is given.
        top_k_groups: int, number of groups per token.
        top_k_experts: int, number of experts per token in each chosen group.
        **kwargs: further arguments of `MoE`, except `router`.

    Call arguments:
        inputs: tensor of shape `(..., d)`; further ones as in `MoE`.

    Returns:
        A tensor of shape `(..., u)`.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> moe = keras_moe.layers.HierarchicalMoE(
    ...     num_groups=4, experts_per_group=8, expert_units=(32, 16)
    ... )
    >>> moe(np.ones((4, 16))).shape == (4, 16), moe.num_experts, moe.top_k
    (True, 32, 4)

    References:
        - [Jordan & Jacobs, 1994: Hierarchical Mixtures of Experts and the EM
          Algorithm](https://doi.org/10.1162/neco.1994.6.2.181)
        - [Shazeer et al., 2017: Outrageously Large Neural Networks, appendix B](
          https://arxiv.org/abs/1701.06538)
    """

    def __init__(
        self,
        num_groups: int,
        experts_per_group: int,
        expert_units: int | Sequence[int] | None = None,
        top_k_groups: int = 2,
        top_k_experts: int = 2,
        *,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        for argument in ("router", "num_experts", "top_k"):
            if argument in kwargs:
                raise ValueError(
                    f"`{argument}` must not be given to HierarchicalMoE; for "
                    "another router use MoE(router=HierarchicalRouter(...)). "
                    f"Received: {argument}={kwargs[argument]!r}"
                )
        router = routers.HierarchicalRouter(
            num_groups,
            experts_per_group,
            top_k_groups,
            top_k_experts,
            dtype=kwargs.get("dtype"),
            name="router",
        )
        self._levels = {
            "num_groups": router.num_groups,
            "experts_per_group": router.experts_per_group,
            "top_k_groups": router.top_k_groups,
            "top_k_experts": router.top_k_experts,
        }
        super().__init__(
            router.num_experts,
            expert_units,
            router.top_k,
            router=router,
            name=layer_name(name, "hierarchical_moe"),
            **kwargs,
        )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        for name in ("num_experts", "top_k", "router"):
            del config[name]
        return {**config, **self._levels}
