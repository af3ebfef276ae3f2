"""More experts in a trained mixture, with the same outputs at step 0.

Axis letters: d input features, e experts, g gates, c copies of an expert, m experts of
one task, s shared experts, t tasks.

New experts are copies. With a softmax over all experts, an expert and its copies share
the expert's weight if each logit z becomes z - T log c, T being the temperature of the
gate: c exp((z - T log c) / T) = exp(z / T). With the k largest weights, all copies of
the chosen experts are chosen if every expert has c copies and k becomes c k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _checks
from keras_moe.experts import LayerExperts
from keras_moe.experts._stacked import StackedKernels
from keras_moe.layers import CGC, PLE, MMoE, MoE, OMoE
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

    With dense gates (`MMoE` and `OMoE` without `top_k`, `PLE`, `CGC`, and `MoE` with a
    `DenseRouter`) any number of experts is exact: gate logits are lowered by the log of
    the number of copies. If experts have different numbers of copies, this needs a bias
    in the gates, which the new layer gets if `layer` has none (`gate_use_bias`, or
    `use_bias` of the router).

    With `top_k`, `num_experts` must be a multiple of `layer.num_experts`; `top_k` (and
    `shared_top_k`) of the new layer is the same multiple, so the cost of a row grows
    too. Rows whose best experts tie are an exception: other experts may be chosen.

    Args:
        layer: a built `MMoE`, `OMoE`, `PLE`, `CGC`, or `MoE` with a `TopKRouter` or
            `DenseRouter`, of exactly these classes, with experts of
            `keras_moe.experts`.
        num_experts: int >= `layer.num_experts`, the new number of experts. For `PLE`
            and `CGC` that of shared experts, `num_shared_experts`, of every level.
        noise: float >= 0. The weights of each copy get Gaussian noise of this share of
            their own standard deviation. Without noise, an expert and its copies have
            equal gradients and stay equal in training, unless dropout makes them
            differ; with it, outputs change a little at step 0.
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
    if type(layer) not in _GROWN:
        raise ValueError(
            f"`layer` must be one of {[kind.__name__ for kind in _GROWN]}. "
            f"Received: layer={layer!r} of the class {type(layer).__name__}"
        )
    if not layer.built:
        raise ValueError(f"`layer` must be built before it grows. Received: {layer!r}")
    shared = isinstance(layer, PLE)
    name = "num_shared_experts" if shared else "num_experts"
    old = getattr(layer, name)
    if _checks.positive_int("num_experts", num_experts) < old or old == 0:
        raise ValueError(
            f"`num_experts` must be at least `layer.{name}`, which must not be 0. "
            f"Received: num_experts={num_experts}, layer.{name}={old}"
        )
    noise = _checks.non_negative_number("noise", noise)
    rng = np.random.default_rng(_checks.seed(seed))
    new, source = _GROWN[type(layer)](layer, np.arange(num_experts) % old)
    levels = layer.experts if shared else [layer.experts]
    levels_of_new = new.experts if shared else [new.experts]
    for experts, more in zip(levels, levels_of_new, strict=True):
        _copy_experts(experts, more, source, noise, rng)
    return new


def _grown_mmoe(layer: MMoE, source: np.ndarray) -> tuple[MMoE, np.ndarray]:
    """Return a built layer with its gates, and the source of each expert."""
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
    config["gate_use_bias"] |= bool(_log_copies(source).any())
    config["num_experts"] = len(source)
    if config["experts"] is not None:
        config["experts"] = _more(layer.experts, source)
    new = type(layer).from_config(config)
    gates = layer.gates
    new.build((None, layer.input_spec.axes[-1]), (None, gates.kernels[0].shape[1]))
    _copy_gates(gates, new.gates, source, layer.gate_temperature)
    return new, source


def _grown_ple(layer: PLE, source: np.ndarray) -> tuple[PLE, np.ndarray]:
    """Return a built layer with its gates, and the source of each expert."""
    t, m = len(layer.tasks), layer.num_task_experts
    of_level = np.concatenate([np.arange(t * m), t * m + source])
    of_task = np.concatenate([np.arange(m), m + source])  # The experts of a task gate.
    config = layer.get_config()
    config["num_shared_experts"] = len(source)
    config["gate_use_bias"] |= bool(_log_copies(of_task).any())
    if config["experts"] is not None:
        config["experts"] = [_more(experts, of_level) for experts in layer.experts]
    new = type(layer).from_config(config)
    new.build((None, layer.input_spec.axes[-1]))
    temperature = layer.gate_temperature
    for gates, more in zip(layer.gates, new.gates, strict=True):
        _copy_gates(gates, more, of_task, temperature)
    for gates, more in zip(layer.shared_gates, new.shared_gates, strict=True):
        _copy_gates(gates, more, of_level, temperature)
    return new, of_level


def _copy_gates(old: Any, new: Any, source: np.ndarray, temperature: float) -> None:
    """Copy gates, with a logit for each of `source`, lowered as copies need it."""
    shift = temperature * _log_copies(source)
    last = len(old.kernels) - 1
    for i, kernel in enumerate(old.kernels):
        value = _array(kernel)
        new.kernels[i].assign(value[..., source] if i == last else value)
    for i, bias in enumerate(new.biases):
        value = _array(old.biases[i]) if old.biases else np.zeros(1)
        if i == last:
            value = np.broadcast_to(value, (*bias.shape[:-1], source.max() + 1))
            value = value[..., source] - shift
        bias.assign(np.broadcast_to(value, bias.shape))


def _grown_moe(layer: MoE, source: np.ndarray) -> tuple[MoE, np.ndarray]:
    """Return a built layer with its router, and the source of each expert."""
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
    return new, source


_GROWN: dict[type, Callable[[Any, np.ndarray], tuple[Any, np.ndarray]]] = {
    MMoE: _grown_mmoe,
    OMoE: _grown_mmoe,
    PLE: _grown_ple,
    CGC: _grown_ple,
    MoE: _grown_moe,
}


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
