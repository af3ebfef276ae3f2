"""More experts in a trained mixture, with the same outputs at step 0.

Axis letters: d input features, e experts, g gates, c copies of an expert.

New experts are copies. With a softmax over all experts, an expert and its copies share
the expert's weight if each logit z becomes z - T log c, T being the temperature of the
gate: c exp((z - T log c) / T) = exp(z / T). With the k largest weights, all copies of
the chosen experts are chosen if every expert has c copies and k becomes c k.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _checks
from keras_moe.experts import LayerExperts
from keras_moe.experts._stacked import StackedKernels
from keras_moe.layers import MMoE, MoE, OMoE
from keras_moe.routers import DenseRouter, TopKRouter


def grow(
    layer: keras.layers.Layer,
    num_experts: int,
    *,
    noise: float = 0.0,
    seed: int | None = None,
) -> keras.layers.Layer:
    """Return a copy of a trained mixture that has more experts and the same outputs.

    New experts are copies of the existing ones, in turn: with 4 experts, experts 4 and
    8 are copies of expert 0. `layer` is not changed.

    With dense gates (`MMoE` and `OMoE` without `top_k`, `MoE` with a `DenseRouter`) any
    number of experts is exact: gate logits are lowered by the log of the number of
    copies. If experts have different numbers of copies, this needs a bias in the gates,
    which the new layer gets if `layer` has none (`gate_use_bias`, or `use_bias` of the
    router).

    With `top_k`, `num_experts` must be a multiple of `layer.num_experts`; `top_k` (and
    `shared_top_k`) of the new layer is the same multiple, so the cost of a row grows
    too. Rows whose best experts tie are an exception: other experts may be chosen.

    Args:
        layer: a built `MMoE`, `OMoE`, or `MoE` with a `TopKRouter` or `DenseRouter`, of
            exactly these classes, with experts of `keras_moe.experts`.
        num_experts: int >= `layer.num_experts`, the new number of experts.
        noise: float >= 0. The weights of each copy get Gaussian noise of this share of
            their own standard deviation. Without noise, an expert and its copies have
            equal gradients and stay equal in training, unless dropout parts them; with
            it, outputs change a little at step 0.
        seed: int, the seed of the noise.

    Returns:
        A built layer of the class of `layer`, with its name.

    Raises:
        ValueError: if an argument is invalid, `layer` is not built or of a class or
            with parts that cannot be grown, or its outputs would change.

    Example:

    >>> layer = keras_moe.layers.MMoE(4, (8, 5), ["click", "buy"])
    >>> x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    >>> before = layer(x)
    >>> grown = keras_moe.upcycling.grow(layer, num_experts=6, noise=0.0)
    >>> grown.num_experts, np.allclose(grown(x)["buy"], before["buy"], atol=1e-5)
    (6, True)
    """
    if type(layer) not in (MMoE, OMoE, MoE):
        raise ValueError(
            "`layer` must be an MMoE, an OMoE or a MoE. "
            f"Received: layer={layer!r} of the class {type(layer).__name__}"
        )
    if not layer.built:
        raise ValueError(f"`layer` must be built before it grows. Received: {layer!r}")
    old = layer.num_experts
    if _checks.positive_int("num_experts", num_experts) < old:
        raise ValueError(
            "`num_experts` must be at least `layer.num_experts`. Received: "
            f"num_experts={num_experts}, layer.num_experts={old}"
        )
    if noise != 0.0:
        _checks.positive_number("noise", noise)
    source = np.arange(num_experts) % old
    rng = np.random.default_rng(_checks.seed(seed))
    grown = _grown_moe if isinstance(layer, MoE) else _grown_mmoe
    new = grown(layer, source)
    _copy_experts(layer.experts, new.experts, source, noise, rng)
    return new


def _grown_mmoe(layer: MMoE, source: np.ndarray) -> MMoE:
    """Return a built layer with the gates of `layer`; its experts are copied later."""
    config = layer.get_config()
    if layer.top_k is not None:
        factor = _factor(layer, source)
        if factor > 1 and layer.top_k + (layer.shared_top_k or 0) == 1:
            raise ValueError(
                "`layer` must choose more than one expert for a row and task: a single "
                "weight is a probability, several are renormalized. Received: "
                f"top_k={layer.top_k}, shared_top_k={layer.shared_top_k}"
            )
        config["top_k"] = factor * layer.top_k
        if layer.shared_top_k is not None:
            config["shared_top_k"] = factor * layer.shared_top_k
    shift = layer.gate_temperature * _log_copies(source)
    if shift.any():
        config["gate_use_bias"] = True
    config["num_experts"] = len(source)
    if config["experts"] is not None:
        config["experts"] = _more(layer.experts, source)
    new = type(layer).from_config(config)
    gates = layer.gates
    new.build((None, layer.input_spec.axes[-1]), (None, gates.kernels[0].shape[1]))
    last = len(gates.kernels) - 1
    for i, kernel in enumerate(gates.kernels):
        value = _array(kernel)
        new.gates.kernels[i].assign(value[..., source] if i == last else value)
    for i, bias in enumerate(new.gates.biases):
        value = _array(gates.biases[i]) if gates.biases else np.zeros(1)
        if i == last:
            value = np.broadcast_to(value, (*bias.shape[:-1], source.max() + 1))
            value = value[..., source] - shift
        bias.assign(np.broadcast_to(value, bias.shape))
    return new


def _grown_moe(layer: MoE, source: np.ndarray) -> MoE:
    """Return a built layer with the router of `layer`; its experts are copied later."""
    router = layer.router
    if type(router) not in (TopKRouter, DenseRouter):
        raise ValueError(
            "`layer` must have a TopKRouter or a DenseRouter. "
            f"Received: layer.router={router!r}"
        )
    arguments = router.get_config()
    shift = np.zeros(len(source))
    if isinstance(router, TopKRouter):
        factor = _factor(layer, source)
        if factor > 1 and router.score_function == "sigmoid" and not router.renormalize:
            raise ValueError(
                "`layer.router` must have renormalize=True with sigmoid scores: the "
                "scores of copies would add up. Received: renormalize=False"
            )
        arguments["top_k"] = factor * router.top_k
    else:
        shift = router.temperature * _log_copies(source)
        arguments["use_bias"] = bool(router.use_bias or shift.any())
    arguments["num_experts"] = len(source)
    config = layer.get_config()
    config |= {"num_experts": len(source), "top_k": None}
    config["router"] = type(router).from_config(arguments)
    if config["experts"] is not None:
        config["experts"] = _more(layer.experts, source)
    new = type(layer).from_config(config)
    new.build((None, layer.input_spec.axes[-1]), (None, router.kernel.shape[0]))
    new.router.kernel.assign(_array(router.kernel)[:, source])
    if new.router.bias is not None:
        bias = (
            np.zeros(source.max() + 1) if router.bias is None else _array(router.bias)
        )
        new.router.bias.assign(bias[source] - shift)
    if layer.shared_experts is not None and new.shared_experts is not None:
        new.shared_experts.set_weights(layer.shared_experts.get_weights())
    return new


def _factor(layer: Any, source: np.ndarray) -> int:
    """Return the number of copies of every expert, which must be the same."""
    old, new = layer.num_experts, len(source)
    if new % old:
        raise ValueError(
            "`num_experts` must be a multiple of `layer.num_experts` if the layer "
            "chooses experts (`top_k`), so that all have as many copies. "
            f"Received: num_experts={new}, layer.num_experts={old}"
        )
    return new // old


def _log_copies(source: np.ndarray) -> np.ndarray:
    """Return the log of the number of copies of each expert; 0 if all have as many."""
    copies = np.bincount(source)
    shift = np.log(copies) if len({*copies.tolist()}) > 1 else np.zeros(len(copies))
    return shift[source]


def _more(experts: Any, source: np.ndarray) -> keras.layers.Layer:
    """Return experts like `experts`, one for each of `source`, not built."""
    if isinstance(experts, LayerExperts):
        clones = []
        for k, i in enumerate(source):
            expert = experts.layers[i]
            # A new name, as two layers of a model must not have the same.
            name = expert.name if k == i else f"{expert.name}_copy_{k}"
            config = {**expert.get_config(), "name": name}
            clones.append(type(expert).from_config(config))
        return type(experts).from_config({**experts.get_config(), "layers": clones})
    stacked = isinstance(experts, StackedKernels) and all(
        weight.shape[:1] == (experts.num_experts,) for weight in experts.weights
    )
    if not stacked:
        raise ValueError(
            "`layer.experts` must be experts of keras_moe.experts, whose weights have "
            f"the experts as their first axis, or LayerExperts. Received: {experts!r}"
        )
    config = experts.get_config()
    return type(experts).from_config({**config, "num_experts": len(source)})


def _copy_experts(
    old: Any, new: Any, source: np.ndarray, noise: float, rng: np.random.Generator
) -> None:
    """Copy weights of `old` experts to the `new` ones, with noise on the copies."""

    def copied(weight: Any, value: np.ndarray, is_copy: bool) -> np.ndarray:
        if not (is_copy and noise and weight.trainable):
            return value
        spread = noise * value.std()
        return value + spread * rng.normal(size=value.shape).astype(value.dtype)

    first = source.max() + 1  # The first copy.
    if isinstance(old, LayerExperts):
        for k, i in enumerate(source):
            pairs = zip(old.layers[i].weights, new.layers[k].weights, strict=True)
            for weight, target in pairs:
                target.assign(copied(weight, _array(weight), k >= first))
        return
    for weight, target in zip(old.weights, new.weights, strict=True):
        value = _array(weight)
        parts = [copied(weight, value[i], k >= first) for k, i in enumerate(source)]
        target.assign(np.stack(parts))


def _array(variable: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(variable))
