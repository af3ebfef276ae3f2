"""Functions and methods that are called with any arguments, and their oracles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

import keras_moe
from keras_moe import losses, metrics, multitask, routers, routing, telemetry, upcycling
from keras_moe.multitask import gradients, heads, weighting
from tests.support import local_experts_oracles, routing_oracles, task_oracles


@dataclass(frozen=True)
class Subject:
    """What is called, and its arguments as text, the first of each is the right one.

    Attributes:
        call: the function; it gets the arguments by name.
        right: by argument, right values.
        oracle: a second implementation on NumPy arrays; None if there is none.
        may_be_nan: whether NaN is a documented result, such as that of no rows.
    """

    call: Callable[..., Any]
    right: dict[str, list[str]]
    oracle: Callable[..., Any] | None = None
    may_be_nan: bool = False


_MASK = ["None", "B(3)", "np.ones(3, bool)", "B(3).tolist()"]
_PROBS = ["P(3, 4)", "P(3, 4).astype('float64')", "P(3, 4).tolist()"]
_INDICES = ["I(4, 3, 2)", "I(4, 3, 1)", "I(4, 3, 2).astype('int64')"]
_ROUTING = ["R(3, 4, 2)", "R(3, 4, 1)", "R(1, 4, 2)"]


def _masked(oracle: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arrays: Any, mask: Any = None) -> Any:
        n = len(arrays[0])
        mask = np.ones(n, bool) if mask is None else np.asarray(mask).astype(bool)
        return oracle(*arrays, mask) if mask.any() else 0.0

    return call


_balancing = _masked(routing_oracles.load_balancing_loss)
_importance = _masked(routing_oracles.cv_squared_of_sums)
_z = _masked(routing_oracles.router_z_loss)
_entropy = _masked(routing_oracles.entropy_loss)

_LOCAL_EXPERTS = {
    "targets": ["F(3, 2)", "F(3, 2).tolist()"],
    "expert_outputs": ["F(3, 4, 2)"],
    "gate_weights": _PROBS,
    "mask": _MASK,
}
_local_experts = _masked(local_experts_oracles.local_experts_loss)
_expected_error = _masked(local_experts_oracles.expected_squared_error)
_mixture_error = _masked(local_experts_oracles.mixture_squared_error)

FUNCTIONS: dict[str, Subject] = {
    "telemetry.rows_needed": Subject(
        telemetry.rows_needed,
        {"num_experts": ["4", "64"], "top_k": ["1", "2"]},
        lambda num_experts, top_k: -(-20 * num_experts // top_k),
    ),
    "losses.local_experts_loss": Subject(
        losses.local_experts_loss,
        _LOCAL_EXPERTS,
        lambda targets, expert_outputs, gate_weights, mask: _local_experts(
            targets, expert_outputs, gate_weights, mask=mask
        ),
    ),
    "losses.expected_squared_error": Subject(
        losses.expected_squared_error,
        _LOCAL_EXPERTS,
        lambda targets, expert_outputs, gate_weights, mask: _expected_error(
            targets, expert_outputs, gate_weights, mask=mask
        ),
    ),
    "losses.mixture_squared_error": Subject(
        losses.mixture_squared_error,
        _LOCAL_EXPERTS,
        lambda targets, expert_outputs, gate_weights, mask: _mixture_error(
            targets, expert_outputs, gate_weights, mask=mask
        ),
    ),
    "losses.load_balancing_loss": Subject(
        losses.load_balancing_loss,
        {"router_probs": _PROBS, "expert_indices": _INDICES, "mask": _MASK},
        lambda router_probs, expert_indices, mask: _balancing(
            router_probs, expert_indices, mask=mask
        ),
    ),
    "losses.multi_gate_load_balancing_loss": Subject(
        losses.multi_gate_load_balancing_loss,
        {
            "gate_probs": ["P(3, 2, 4)"],
            "gate_weights": ["P(3, 2, 4)", "P(3, 2, 4) * (P(3, 2, 4) > 0.2)"],
            "mask": _MASK,
        },
    ),
    "losses.importance_loss": Subject(
        losses.importance_loss,
        {"gate_weights": _PROBS, "mask": _MASK},
        lambda gate_weights, mask: _importance(gate_weights, mask=mask),
    ),
    "losses.load_loss": Subject(
        losses.load_loss,
        {"choice_probs": _PROBS, "mask": _MASK},
        lambda choice_probs, mask: _importance(choice_probs, mask=mask),
    ),
    "losses.router_z_loss": Subject(
        losses.router_z_loss,
        {"router_logits": ["F(3, 4)", "F(3, 4).tolist()"], "mask": _MASK},
        lambda router_logits, mask: _z(router_logits, mask=mask),
    ),
    "losses.entropy_loss": Subject(
        losses.entropy_loss,
        {"router_probs": _PROBS, "mask": _MASK},
        lambda router_probs, mask: _entropy(router_probs, mask=mask),
    ),
    "losses.entropy": Subject(
        losses.entropy,
        {"probs": [*_PROBS, "P(2, 3, 4)", "P(4)"]},
        lambda probs: -np.sum(probs * np.log(probs), axis=-1),
    ),
    "losses.cv_squared": Subject(
        losses.cv_squared,
        {"values": ["P(4)", "np.array([1.0, 3.0])", "[1.0, 2.0]"]},
        lambda values: np.var(values) / np.mean(values) ** 2,
    ),
    "losses.auxiliary_losses": Subject(
        lambda routing, weights: list(
            losses.auxiliary_losses(routing, weights).values()
        ),
        {
            "routing": _ROUTING,
            "weights": [
                "{'load_balancing': 0.1}",
                "{}",
                "{'router_z': 1, 'entropy': 2.0}",
            ],
        },
    ),
    "routing.top_k": Subject(
        routing.top_k,
        {"scores": ["F(3, 4)", "F(2, 3, 4)", "F(4)"], "k": ["2", "1", "4"]},
        lambda scores, k: np.argsort(-scores, axis=-1, kind="stable")[..., : int(k)],
    ),
    "routing.choose": Subject(
        routing.choose,
        {"values": ["F(3, 4)"], "indices": _INDICES},
        lambda values, indices: np.take_along_axis(values, indices, axis=-1),
    ),
    "routing.rows_where": Subject(
        routing.rows_where,
        {"kept": ["B(3)"], "rows": ["F(3, 4)", "F(3, 5)"]},
        lambda kept, rows: np.where(kept.astype(bool)[..., None], rows, 0),
    ),
    "routing.gates": Subject(
        routing.gates,
        {"routing": ["R(3, 4, 2)"], "num_experts": ["4"], "num_tokens": ["3"]},
    ),
    "routing.expert_counts": Subject(
        lambda indices, num_experts, counted, dtype: routing.expert_counts(
            indices, num_experts, counted, dtype
        ),
        {
            "indices": _INDICES,
            "num_experts": ["4", "5"],
            "counted": _MASK,
            "dtype": ["'float32'", "'int32'"],
        },
    ),
    "routing.expert_capacity": Subject(
        routing.expert_capacity,
        {
            "num_tokens": ["8", "0", "100"],
            "num_experts": ["4", "np.int64(4)"],
            "top_k": ["2", "1"],
            "capacity_factor": ["1.0", "1.25", "2"],
        },
    ),
    "routing.sort_choices": Subject(
        lambda **given: list(routing.sort_choices(**given)),
        {"routing": _ROUTING, "num_experts": ["4"], "queue": ["None"]},
    ),
    "routing.capacity_slots": Subject(
        lambda **given: [s for s in routing.capacity_slots(**given) if s is not None],
        {
            "routing": ["R(3, 4, 2)"],
            "num_experts": ["4"],
            "expert_capacity": ["2", "1", "3"],
            "priority": ["'position'", "'probability'"],
        },
    ),
    "routing.checked_record": Subject(
        lambda **given: list(routing.checked_record(**given)),
        {"routing": ["R(3, 4, 2)"], "num_experts": ["4"], "num_tokens": ["3", "None"]},
    ),
    "routing.shifted": Subject(
        routing.shifted,
        {"ends": ["I(9, 4)", "I(9, 1)"]},
        lambda ends: np.concatenate([[0], ends[:-1]]),
    ),
    "routing.tokens_in_rows": Subject(
        lambda rows, filled, n, k: routing.tokens_in_rows(
            routing.sort_choices(keras_moe.routing.Routing(*_record()), 4),
            rows,
            filled,
            n,
            k,
        ),
        {"rows": ["I(6, 6)"], "filled": ["np.ones(6, bool)"], "n": ["3"], "k": ["2"]},
    ),
    "routing.union": Subject(
        lambda gates, max_experts: [
            routing.union(gates, max_experts)[0].expert_indices,
            routing.union(gates, max_experts)[1],
        ],
        {"gates": ["P(3, 2, 4)"], "max_experts": ["4", "2"]},
    ),
    "routers.get": Subject(
        lambda identifier: [routers.get(identifier, num_experts=4).num_experts],
        {
            "identifier": [
                "'top_k'",
                "routers.TopKRouter(4, 2)",
                "'dense'",
                "'sinkhorn'",
            ]
        },
    ),
    "multitask.heads.get": Subject(
        lambda identifier: [heads.get(identifier).output_units],
        {"identifier": ["'binary'", "heads.Ordinal(3)", "'ziln'"]},
    ),
    "multitask.weighting.get": Subject(
        lambda identifier: [weighting.get(identifier) is None],
        {"identifier": ["None", "'famo'", "weighting.DWA(3)"]},
    ),
    "multitask.gradients.get": Subject(
        lambda identifier: [gradients.get(identifier) is None],
        {"identifier": ["None", "'pcgrad'", "gradients.CAGrad(0.3)"]},
    ),
    "upcycling.grow": Subject(
        lambda **given: upcycling.grow(**given)(np.ones((3, 6), "float32")),
        {
            "layer": ["built(MMoE(4, 5, ['a', 'b']))"],
            "num_experts": ["8", "5", "4"],
            "noise": ["0.0", "0.1"],
            "seed": ["None", "3"],
        },
    ),
    "upcycling.moe_from_dense": Subject(
        lambda **given: upcycling.moe_from_dense(**given)(np.ones((3, 6), "float32")),
        {
            "layers": ["[built(keras.layers.Dense(5))]"],
            "num_experts": ["4", "2"],
            "top_k": ["None", "2"],
        },
    ),
    "upcycling.upcycle": Subject(
        lambda **given: upcycling.upcycle(**given)(np.ones((3, 6), "float32")),
        {
            "model": [
                "keras.Sequential([keras.Input((6,)), "
                "keras.layers.Dense(5, name='up')])"
            ],
            "layers": ["['up']"],
            "num_experts": ["4", "2"],
            "top_k": ["None", "2"],
        },
    ),
    "initializers.independent": Subject(
        lambda initializer, key: [
            keras_moe.initializers.independent(initializer, key) is None
        ],
        {"initializer": ["keras.initializers.HeNormal(3)", "'zeros'"], "key": ["1"]},
    ),
    "initializers.is_seeded": Subject(
        lambda initializer: [keras_moe.initializers.is_seeded(initializer)],
        {"initializer": ["keras.initializers.HeNormal(3)", "'zeros'"]},
    ),
    "distribution.plan": Subject(
        lambda **given: [float(len(keras_moe.distribution.plan(**given)))],
        {
            "model": ["keras.Sequential([keras.Input((6,)), MoE(4, 5)])"],
            "num_devices": ["4", "1"],
            "batch_size": ["8", "4"],
            "bandwidth": ["1e9", "1"],
            "flops": ["1e12"],
            "optimizer_slots": ["2", "0"],
            "tokens_per_row": ["1", "2"],
            "ids_per_row": ["1"],
            "table_rows": ["None", "100"],
            "expert_devices": ["None", "2"],
        },
    ),
    "multitask.MultiTaskModel": Subject(
        lambda x=None, **given: multitask.MultiTaskModel(
            **{**given, "outputs": _outputs(given["inputs"], given["outputs"])}
        )(np.ones((3, 6), "float32")),
        {
            "inputs": ["keras.Input((6,))"],
            "outputs": ["['a', 'b']", "['a']"],
            "loss_weighting": ["None", "'famo'", "weighting.DWA(3)", "'pcgrad'"],
            "tasks": ["None", "[multitask.Task('a'), multitask.Task('b')]"],
            "shared_layers": ["None", "[]"],
            "name": ["None", "'a'"],
        },
    ),
}


def _record() -> list[Any]:
    from tests.robustness import values

    record = values.routing(3, 4, 2)
    return [record.expert_indices, record.combine_weights]


def _outputs(inputs: Any, names: Any) -> Any:
    """Outputs by name; what is not a list of names stays as it is."""
    if not isinstance(names, list):
        return names
    if not isinstance(inputs, keras.KerasTensor):
        inputs = keras.Input((6,))
    return {name: keras.layers.Dense(1, "sigmoid")(inputs) for name in names}


def _metric(make: Callable[[], Any], *names: str) -> Callable[..., Any]:
    def call(**given: Any) -> Any:
        metric = make()
        metric.update_state(**{name: given[name] for name in names if name in given})
        return metric.result()

    return call


_ROWS = {
    "y_true": ["np.array([1.0, 0.0, 1.0])", "I(2, 3)", "I(2, 3, 1)", "[1, 0, 1]"],
    "y_pred": ["np.array([0.9, 0.2, 0.4])", "np.array([[0.9], [0.2], [0.4]])"],
    "sample_weight": ["None", "np.array([1.0, 0.0, 2.0])", "B(3)"],
}
_GROUPS = {**_ROWS, "groups": ["I(2, 3)", "I(3, 3)", "[0, 0, 1]"]}

METHODS: dict[str, Subject] = {
    **{
        f"metrics.{name}.update_state": Subject(
            _metric(getattr(metrics, name), "y_true", "y_pred", "sample_weight"),
            _ROWS,
            may_be_nan=True,
        )
        for name in ("PCOC", "RankAUC", "NormalizedEntropy", "ExpectedCalibrationError")
    },
    "metrics.XAUC.update_state": Subject(
        _metric(lambda: metrics.XAUC(16), "y_true", "y_pred", "sample_weight"),
        _ROWS,
        may_be_nan=True,
    ),
    "metrics.GAUC.update_state": Subject(
        _metric(lambda: metrics.GAUC(max_rows=16), *_GROUPS), _GROUPS, may_be_nan=True
    ),
    "metrics.BySegment.update_state": Subject(
        _metric(lambda: metrics.BySegment(keras.metrics.AUC(), 2), *_GROUPS),
        _GROUPS,
        may_be_nan=True,
    ),
    "metrics.GatePolarization.update_state": Subject(
        _metric(metrics.GatePolarization, "gate_weights", "mask"),
        {"gate_weights": ["P(3, 2, 4)", "P(2, 4)", "P(2, 3, 2, 4)"], "mask": _MASK},
    ),
    "metrics.RoutingMetrics.update_state": Subject(
        _metric(lambda: metrics.RoutingMetrics(4, ["load_cv"]), "routing", "kept"),
        {"routing": ["R(3, 4, 2)", "R(3, 4, 1)"], "kept": ["None", "B(3, 2)"]},
    ),
    **{
        f"heads.{name}.call": Subject(
            lambda y_true, y_pred, sample_weight, make=make: make()(
                y_true, y_pred, sample_weight
            ),
            {
                "y_true": labels,
                "y_pred": [outputs],
                "sample_weight": ["None", "np.array([1.0, 0.0, 2.0])"],
            },
            lambda y_true, y_pred, sample_weight, oracle=oracle: task_oracles.mean(
                oracle, y_true, y_pred, sample_weight
            ),
        )
        for name, make, labels, outputs, oracle in (
            (
                "LogLoss",
                heads.LogLoss,
                ["np.array([1.0, 0.0, 1.0])", "I(2, 3)", "np.array([0.5, 0.0, 1.0])"],
                "np.array([[0.9], [0.2], [0.4]])",
                task_oracles.binary,
            ),
            (
                "SquaredError",
                heads.SquaredError,
                ["F(3)", "I(2, 3)"],
                "F(3, 1)",
                task_oracles.squared_error,
            ),
            (
                "OrdinalLoss",
                heads.OrdinalLoss,
                ["I(3, 3)", "I(3, 3).astype('float32')"],
                "np.array([[0.9, 0.5], [0.2, 0.1], [0.4, 0.4]])",
                task_oracles.ordinal,
            ),
            (
                "ClassLoss",
                heads.ClassLoss,
                ["I(3, 3)", "I(3, 3).astype('float32')"],
                "P(3, 3)",
                task_oracles.multi_class,
            ),
        )
    },
}
