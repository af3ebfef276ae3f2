"""Base classes of routers: the interface to `MoE`, and linear logits.

Axis letters: n tokens, d input features, e experts, k choices per token.
"""

from __future__ import annotations

from typing import Any, ClassVar

import keras
from keras import ops

from keras_moe import _checks
from keras_moe._layer import Layer
from keras_moe.initializers import independent

# Makes the values differ from those of experts with the same seeded initializer.
STREAM = tuple(b"router")


class Router(Layer):
    """The base class of routers: the interface between a router and a `MoE`.

    A router maps tokens to a record of `keras_moe.routing`. A custom router is a
    subclass with a method `call`, or any layer with these attributes.

    Class attributes:
        choice: the kind of choice and record: "token" (tokens choose experts,
            `Routing`), "expert" (experts choose tokens, `ExpertChoiceRouting`) or "all"
            (no choice, `DenseRouting`).
        reads_ids: bool, whether the tokens are integer ids instead of features. A `MoE`
            then needs `router_inputs`.
        has_probs: bool, whether the record has `router_logits` and `router_probs`,
            which some metrics of a `MoE` need.
        supported_losses: names of the auxiliary losses that can be computed from the
            record: a subset of "load_balancing", "importance", "load", "router_z" and
            "entropy". (`losses` is an attribute of every Keras layer.)
        default_loss_weights: weights of the losses that a `MoE` adds by default.
        wrong_in_exports: export formats in which the router would have other outputs.

    Args:
        num_experts: int, number of experts e.
        top_k: int, number of experts per token, k.
        **kwargs: arguments of `keras.layers.Layer`, such as `dtype` and `name`.

    Call arguments:
        tokens: float tensor of shape `(n, d)`, or integer ids of shape `(n,)`.
        mask: bool tensor of shape `(n,)`, False for padding.
        training: bool, whether the call is in training mode.

    Returns:
        A record of `keras_moe.routing`.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> class FirstExpertRouter(keras_moe.routers.Router):
    ...     has_probs = False
    ...
    ...     def call(self, tokens, mask=None, training=None):
    ...         indices = keras.ops.zeros((len(tokens), 1), "int32")
    ...         weights = keras.ops.ones((len(tokens), 1))
    ...         return keras_moe.routing.Routing(indices, weights, mask=mask)
    >>> router = FirstExpertRouter(num_experts=4, top_k=1)
    >>> moe = keras_moe.layers.MoE(expert_units=8, router=router)
    >>> moe(np.ones((3, 16))).shape == (3, 8)
    True
    """

    choice: ClassVar[str] = "token"
    reads_ids: ClassVar[bool] = False
    has_probs: ClassVar[bool] = True
    supported_losses: ClassVar[frozenset[str]] = frozenset()
    default_loss_weights: ClassVar[dict[str, float]] = {}
    wrong_in_exports: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, num_experts: int, top_k: int, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True
        self.num_experts = _checks.positive_int("num_experts", num_experts)
        self.top_k = _checks.top_k(top_k, self.num_experts)

    @property
    def least_rank(self) -> int:  # type: ignore[override]
        """The minimum rank of the tokens: ids have no feature axis."""
        return 1 if self.reads_ids else 2

    @property
    def feature_axes(self) -> int:  # type: ignore[override]
        """The number of axes of the tokens that a mask lacks."""
        return 0 if self.reads_ids else 1

    def _check_has_gradient(self, training: bool | None, rule: str) -> None:
        """Raise ValueError in training if the only weight is always 1 (no gradient)."""
        kernel = getattr(self, "kernel", None)
        trained = self.trainable and (kernel is None or kernel.trainable)
        if training and trained and self.top_k == 1:
            raise ValueError(
                f"{rule} to train {type(self).__name__} with `top_k=1`: the weight is "
                "always 1, and the router gets no gradient. Inference, and training "
                "with `router.trainable = False`, are supported. "
                f"Received: top_k=1, training={training}"
            )

    def compute_mask(self, inputs: Any, mask: Any = None) -> None:
        """Return None: the mask is a field of the record."""
        return None

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "top_k": self.top_k,
        }


class LinearRouter(Router):
    """A router whose logits are a linear function of the token."""

    most_rank = 2

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
        self.use_bias = _checks.flag("use_bias", use_bias)
        self.kernel_initializer = _checks.initializer(
            "kernel_initializer", kernel_initializer
        )
        self.kernel_regularizer = _checks.regularizer(
            "kernel_regularizer", kernel_regularizer
        )
        self.bias_initializer = _checks.initializer(
            "bias_initializer", bias_initializer
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = _checks.last_dimension(type(self).__name__, input_shape)
        self.input_spec = keras.layers.InputSpec(ndim=2, axes={-1: features})
        # A mixed policy opens an autocast scope even if the layer disables it;
        # `autocast=False` keeps the weight in float32 there.
        self.kernel = self.add_weight(
            name="kernel",
            shape=(features, self.num_experts),
            initializer=independent(self.kernel_initializer, *STREAM, 0),
            regularizer=self.kernel_regularizer,
            autocast=False,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.num_experts,),
                initializer=independent(self.bias_initializer, *STREAM, 1),
                autocast=False,
            )

    def _prepared(self, tokens: Any, mask: Any) -> tuple[Any, Any]:
        """Return tokens in the routing dtype, and the mask as bool or None.

        Padding is set to zero, which keeps its NaN out of the gradients.
        """
        tokens = ops.cast(tokens, self.precise_dtype)
        if mask is None:
            return tokens, None
        mask = ops.cast(mask, "bool")
        kept = ops.expand_dims(mask, -1)
        return ops.where(kept, tokens, ops.zeros_like(tokens)), mask

    def _logits(self, tokens: Any) -> Any:
        logits = ops.matmul(tokens, ops.cast(self.kernel, self.precise_dtype))
        if self.bias is not None:
            logits = logits + ops.cast(self.bias, self.precise_dtype)
        return logits

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
        }
