"""Sparse upcycling: a trained dense MLP becomes the experts of a mixture.

Axis letters: d input features, e experts, u output units.

Every expert starts as a copy of the MLP, and the weights of a token's k experts sum to
1, so the mixture starts where the dense model ended (Komatsuzaki et al. 2023). The
experts part as soon as they see different tokens.
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
    """Return a copy of `model` in which a mixture takes the place of an MLP.

    The copy gives the outputs that `model` gives. `model` itself stays as it is. The
    copy is not compiled.

    Args:
        model: a built functional or Sequential model.
        layers: the Dense layers of the MLP, or their names, first to last; each feeds
            the next one and nothing else.
        num_experts: int, number of experts e.
        top_k: int >= 2, number of experts that compute a token. With one expert the
            weight is the router's probability, which is not 1. None: as in `MoE`.
        **kwargs: further arguments of `keras_moe.layers.MoE`.

    Returns:
        A model of the same inputs and outputs, with a `MoE` of the name of the first
        Dense layer.

    Raises:
        ValueError: if `model` is not such a model, or `layers` are no chain of Dense
            layers of the model that stacked experts can hold.

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
    # Only these know which layer feeds which.
    if not isinstance(model, keras.Model) or not getattr(model, "outputs", None):
        raise ValueError(
            "`model` must be a built functional or Sequential model. "
            f"Received: model={model!r}"
        )
    if isinstance(layers, str):
        raise ValueError(
            f"`layers` must be a sequence of layers or names. Received: {layers!r}"
        )
    if "name" in kwargs:
        raise ValueError(
            "`name` follows from the first of `layers`. "
            f"Received: name={kwargs['name']!r}"
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
        # A clone names its inputs anew; they hold nothing.
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
    """Return a built `MoE` whose experts all are the MLP that `layers` are.

    Args:
        layers: built Dense layers, first to last. All but the last have one activation.
        num_experts: int, number of experts e.
        top_k: int >= 2, number of experts that compute a token; None as in `MoE`.
        **kwargs: further arguments of `keras_moe.layers.MoE`.

    Returns:
        A `MoE` that maps `(..., d)` to `(..., u)` as `layers` do.

    Raises:
        ValueError: if an argument breaks its rule.
    """
    layers = list(layers)
    _check_layers(layers)
    if top_k is not None and _checks.positive_int("top_k", top_k) == 1:
        raise ValueError(
            "`top_k` must be >= 2: the weight of a single expert is the router's "
            "probability, so that the mixture would not give the outputs of the MLP. "
            "Received: top_k=1"
        )
    for name in _FOLLOWING:
        if kwargs.get(name):
            raise ValueError(
                f"`{name}` follows from the layers. Received: {name}={kwargs[name]!r}"
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
    _check_equal(moe, layers, kwargs)
    return moe


def _copy_state(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Copy weights and what else a file would hold, vocabularies and statistics."""
    for old, new in zip(
        source._flatten_layers(), target._flatten_layers(), strict=True
    ):
        store: dict[str, Any] = {}
        old.save_own_variables(store)
        if store:
            # Arrays of their own: JAX gives those of a model away when it trains it.
            copies = {k: np.array(ops.convert_to_numpy(x)) for k, x in store.items()}
            new.load_own_variables(copies)
        if hasattr(old, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                old.save_assets(folder)
                new.load_assets(folder)


# What the experts of an upcycled layer take from the Dense layers.
_FOLLOWING = (
    "experts",
    "expert_units",
    "num_shared_experts",
    "activation",
    "use_bias",
    "dropout",
    "kernel_initializer",
    "kernel_regularizer",
)


def _check_equal(moe: MoE, layers: Sequence[Any], arguments: dict[str, Any]) -> None:
    """Refuse a router or a dispatch whose weights do not sum to 1 for every token."""
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
            "the further arguments must leave every token experts whose weights sum to "
            "1, or the mixture does not give the outputs of the MLP. Received: "
            f"{arguments}, with which outputs differ by up to "
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
            f"every one of `layers` must be a layer of the model, {names}. "
            f"Received: {layer!r}"
        )
    return model.get_layer(name)


def _check_layers(layers: Sequence[Any]) -> None:
    if not layers or any(type(layer) is not keras.layers.Dense for layer in layers):
        raise ValueError(
            f"`layers` must be one Dense layer or several. Received: {layers!r}"
        )
    for layer in layers:
        if not layer.built:
            raise ValueError(
                f"`layers` must be built, so that they have weights. Received: {layer}"
            )
    for rule, values in {
        "use a bias, or none": {layer.use_bias for layer in layers},
        "have one activation, but for the last": {
            str(keras.activations.serialize(layer.activation)) for layer in layers[:-1]
        },
    }.items():
        if len(values) > 1:
            raise ValueError(
                f"`layers` must all {rule}, as the layers of stacked experts do. "
                f"Received: {sorted(map(str, values))}"
            )


def _check_chain(chain: Sequence[keras.layers.Layer], model: keras.Model) -> None:
    """Each layer is called once, and feeds the next one and nothing else."""
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
                "each of `layers` must feed the next one and nothing else. Received: "
                f"{layer.name!r}, whose output is one of the model"
            )
    for layer, following in itertools.pairwise(chain):
        fed = [node.operation for node in layer._outbound_nodes]
        if fed != [following]:
            raise ValueError(
                "each of `layers` must feed the next one and nothing else. Received: "
                f"{layer.name!r}, which feeds {[other.name for other in fed]}, before "
                f"{following.name!r}. With a layer in between, upcycle each alone"
            )
