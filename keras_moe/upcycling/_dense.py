"""Sparse upcycling: initialize the experts of a mixture from a trained dense MLP.

Axis letters: d input features, e experts, u output units.

Every expert starts as a copy of the MLP, and the weights of a token's k experts sum to
1, so the mixture initially computes the same outputs (Komatsuzaki et al. 2023). Experts
diverge in training, as they are trained on different tokens.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _checks
from keras_moe.experts import MLPExperts
from keras_moe.layers import MoE


def upcycle(
    model: keras.Model,
    layers: Sequence[str | keras.layers.Layer],
    num_experts: int,
    top_k: int | None = None,
    **kwargs: Any,
) -> keras.Model:
    """Return a copy of `model` with an MLP replaced by a mixture of experts.

    The copy has the same outputs as `model`. It is not compiled, and `model` is not
    changed.

    Args:
        model: a built functional or Sequential model.
        layers: the Dense layers of the MLP, or their names, first to last; each must
            feed only the next one.
        num_experts: int, number of experts e.
        top_k: int >= 2, number of experts per token. With one expert the weight is the
            router's probability, not 1. None: as in `MoE`.
        **kwargs: further arguments of `keras_moe.layers.MoE`.

    Returns:
        A model with the same inputs and outputs, and a `MoE` with the name of the first
        Dense layer.

    Raises:
        ValueError: if `model` is not such a model, or `layers` are not a chain of Dense
            layers of the model with compatible biases and activations.

    Example:

    >>> inputs = keras.Input((4,))
    >>> hidden = keras.layers.Dense(16, activation="relu", name="up")(inputs)
    >>> model = keras.Model(inputs, keras.layers.Dense(3, name="down")(hidden))
    >>> sparse = keras_moe.upcycling.upcycle(model, ["up", "down"], num_experts=8)
    >>> x = np.ones((2, 4), "float32")
    >>> np.allclose(sparse.predict(x, verbose=0), model.predict(x, verbose=0))
    True

    References:
        - [Komatsuzaki et al., 2023: Sparse Upcycling](https://arxiv.org/abs/2212.05055)
    """
    # Only these models have a layer graph.
    if not isinstance(model, keras.Model) or not getattr(model, "outputs", None):
        raise ValueError(
            "`model` must be a built functional or Sequential model. "
            f"Received: model={model!r}"
        )
    layers = _checks.items("layers", layers, "a sequence of layers or names")
    if "name" in kwargs:
        raise ValueError(
            "`name` must not be given: it is the name of the first of `layers`. "
            f"Received: name={kwargs['name']!r}"
        )
    if not all(isinstance(layer, str | keras.layers.Layer) for layer in layers):
        raise ValueError(
            f"`layers` must be layers or their names. Received: layers={layers!r}"
        )
    chain = [_layer_of(model, layer) for layer in layers]
    _check_layers(chain)
    _check_chain(chain, model)
    moe = moe_from_dense(chain, num_experts, top_k, name=chain[0].name, **kwargs)
    replaced = {chain[0].name: moe}
    for layer in chain[1:]:
        replaced[layer.name] = keras.layers.Identity(name=layer.name)

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        if layer.name in replaced:
            return replaced[layer.name]
        return type(layer).from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=clone)
    for layer in model.layers:
        # Cloned inputs have new names, and no weights to copy.
        inputs = isinstance(layer, keras.layers.InputLayer)
        if layer.name not in replaced and not inputs:
            _copy_state(layer, copy.get_layer(layer.name))
    return copy


def moe_from_dense(
    layers: Sequence[keras.layers.Dense],
    num_experts: int,
    top_k: int | None = None,
    **kwargs: Any,
) -> MoE:
    """Return a built `MoE` whose experts are copies of the MLP `layers`.

    Args:
        layers: built Dense layers, first to last. All but the last must have the same
            activation.
        num_experts: int, number of experts e.
        top_k: int >= 2, number of experts per token. None: as in `MoE`.
        **kwargs: further arguments of `keras_moe.layers.MoE`.

    Returns:
        A `MoE` that maps `(..., d)` to `(..., u)`, with the same outputs as `layers`.

    Raises:
        ValueError: if an argument is invalid.
    """
    layers = list(_checks.items("layers", layers, "a sequence of Dense layers"))
    _check_layers(layers)
    if top_k is not None and _checks.positive_int("top_k", top_k) == 1:
        raise ValueError(
            "`top_k` must be >= 2: the weight of a single expert is the router's "
            "probability, which would change the outputs of the MLP. "
            "Received: top_k=1"
        )
    for name in _FROM_LAYERS:
        if kwargs.get(name):
            raise ValueError(
                f"`{name}` must not be given: it is taken from `layers`. "
                f"Received: {name}={kwargs[name]!r}"
            )
    experts = MLPExperts(
        num_experts,
        [layer.units for layer in layers],
        layers[0].activation if len(layers) > 1 else None,
        layers[0].use_bias,
        final_activation=layers[-1].activation,
        kernel_regularizer=layers[0].kernel_regularizer,
        bias_regularizer=layers[0].bias_regularizer,
        dtype=layers[0].dtype_policy,
        name="experts",
    )
    kwargs.setdefault("dtype", layers[0].dtype_policy)
    moe = MoE(num_experts, None, top_k, experts=experts, **kwargs)
    moe.build((None, layers[0].kernel.shape[0]))
    for i, layer in enumerate(layers):
        experts.kernels[i].assign(_copies(layer.kernel, num_experts))
        if layer.use_bias:
            experts.biases[i].assign(_copies(layer.bias, num_experts))
    _check_same_outputs(moe, layers, kwargs)
    return moe


def _copy_state(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Copy weights and other saved state, such as vocabularies and statistics."""
    for old, new in zip(
        source._flatten_layers(), target._flatten_layers(), strict=True
    ):
        store: dict[str, Any] = {}
        old.save_own_variables(store)
        if store:
            # Copies, because JAX donates the buffers of a model in training.
            copies = {k: np.array(ops.convert_to_numpy(x)) for k, x in store.items()}
            new.load_own_variables(copies)
        if hasattr(old, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                old.save_assets(folder)
                new.load_assets(folder)


# Arguments of `MoE` that are taken from the Dense layers.
_FROM_LAYERS = (
    "experts",
    "expert_units",
    "num_shared_experts",
    "activation",
    "use_bias",
    "dropout",
    "kernel_initializer",
    "kernel_regularizer",
)


def _check_same_outputs(
    moe: MoE, layers: Sequence[Any], arguments: dict[str, Any]
) -> None:
    """Raise ValueError if `moe` does not have the outputs of `layers`."""
    features = layers[0].kernel.shape[0]
    rows = np.random.default_rng(0).normal(size=(64, features)).astype("float32")
    expected = rows
    for layer in layers:
        expected = layer(expected)
    found, expected = (
        ops.convert_to_numpy(ops.cast(x, "float32")) for x in (moe(rows), expected)
    )
    if not np.allclose(found, expected, rtol=0.05, atol=0.02 * np.abs(expected).max()):
        raise ValueError(
            "the further arguments must give every token experts whose weights sum to "
            "1, to preserve the outputs of the MLP. Received: "
            f"{arguments}, which change outputs by up to "
            f"{np.abs(found - expected).max():.2g}"
        )


def _copies(weight: Any, count: int) -> Any:
    """(...) -> (e, ...)."""
    return ops.repeat(ops.expand_dims(weight, 0), count, axis=0)


def _layer_of(model: keras.Model, layer: Any) -> keras.layers.Layer:
    names = [known.name for known in model.layers]
    name = getattr(layer, "name", layer)
    if name not in names:
        raise ValueError(
            f"`layers` must be layers of the model, {names}. Received: {layer!r}"
        )
    return model.get_layer(name)


def _check_layers(layers: Sequence[Any]) -> None:
    if not layers or any(type(layer) is not keras.layers.Dense for layer in layers):
        raise ValueError(
            f"`layers` must be one or more Dense layers. Received: {layers!r}"
        )
    for layer in layers:
        if not layer.built:
            raise ValueError(
                f"`layers` must be built before upcycling. Received: {layer}"
            )
    for rule, values in {
        "have a bias, or all have none": {layer.use_bias for layer in layers},
        "have one activation, except the last": {
            str(keras.activations.serialize(layer.activation)) for layer in layers[:-1]
        },
    }.items():
        if len(values) > 1:
            raise ValueError(
                f"`layers` must all {rule}, as required by MLPExperts. "
                f"Received: {sorted(map(str, values))}"
            )


def _check_chain(chain: Sequence[keras.layers.Layer], model: keras.Model) -> None:
    """Raise ValueError unless each layer is called once and feeds only the next one."""
    outputs = {id(tensor) for tensor in model.outputs}
    for layer in chain:
        if len(layer._inbound_nodes) != 1:
            raise ValueError(
                "each of `layers` must be called once. Received: "
                f"{layer.name!r}, which is called {len(layer._inbound_nodes)} times"
            )
    for layer in chain[:-1]:
        if id(layer.output) in outputs:
            raise ValueError(
                "each of `layers` must feed only the next one. Received: "
                f"{layer.name!r}, whose output is an output of the model"
            )
    for layer, following in itertools.pairwise(chain):
        fed = [node.operation for node in layer._outbound_nodes]
        if fed != [following]:
            raise ValueError(
                "each of `layers` must feed only the next one. Received: "
                f"{layer.name!r}, which feeds {[other.name for other in fed]}, not "
                f"{[following.name]}. Upcycle layers that are not adjacent separately"
            )
