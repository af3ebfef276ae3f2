"""The figures of a router by hand, for every kind of record, alone and in `fit`."""

import math
import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe._layer import Layer
from keras_moe.layers import MoE
from keras_moe.metrics import RoutingMetrics
from keras_moe.routers import TopKRouter
from keras_moe.routing import DenseRouting, ExpertChoiceRouting, Routing
from tests.support import backends
from tests.support.checks import not_on_jax

ALL = RoutingMetrics.KNOWN
PROBS = np.array(
    [
        [0.5, 0.25, 0.25, 0.0],
        [0.0, 1.0, 0.0, 0.0],
        [0.25, 0.25, 0.25, 0.25],
        [0.5, 0.5, 0.0, 0.0],
    ]
)
# Entropies 1.5 log 2, 0, 2 log 2 and log 2; confidences 0.5, 1, 0.25 and 0.5.
LOG2 = math.log(2.0)
CHOICES = np.array([[0, 1], [1, 0], [2, 1], [0, 1]])


def chosen(mask=None, probs=PROBS, indices=CHOICES):
    return Routing(indices, np.full(indices.shape, 0.5), None, probs, mask)


def figures(metric):
    """The result as floats, without the prefix."""
    return {k.removeprefix("moe_"): float(v) for k, v in metric.result().items()}


def after(*updates, show=ALL, num_experts=4):
    metric = RoutingMetrics(num_experts, show)
    for record, *kept in updates:
        metric.update_state(record, *kept)
    return figures(metric)


def wanted(expert_load=(), **rest):
    """What `figures` should give: the loads one by one."""
    load = {f"expert_load_{k}": v for k, v in enumerate(expert_load)}
    return pytest.approx({**load, **rest}, abs=1e-6)


def test_choices_of_tokens_by_hand():
    # Loads 3, 4, 1, 0 of 8: mean 2, variance (1 + 4 + 1 + 4) / 4 = 2.5
    kept = np.array([[True, True], [True, True], [True, False], [False, False]])
    assert after((chosen(), kept)) == wanted(
        expert_load=[3 / 8, 4 / 8, 1 / 8, 0],
        load_cv=math.sqrt(2.5) / 2,
        dropped_fraction=3 / 8,
        router_entropy=4.5 * LOG2 / 4,
        router_confidence=2.25 / 4,
    )


def test_padding_and_tokens_that_are_not_finite_do_not_count():
    # What is left are the first two: loads 2, 2, 0, 0, of which one is dropped.
    probs, indices = PROBS.copy(), CHOICES.copy()
    probs[2], indices[2] = np.nan, 99
    probs[3, 1] = np.inf
    mask = np.array([True, True, False, True])
    kept = np.array([[True, False], [True, True], [False, True], [False, False]])
    expected = wanted(
        expert_load=[0.5, 0.5, 0, 0],
        load_cv=1.0,
        dropped_fraction=1 / 4,
        router_entropy=1.5 * LOG2 / 2,
        router_confidence=0.75,
    )
    assert after((chosen(mask, probs, indices), kept)) == expected
    dense = DenseRouting(probs, None, probs, mask)
    # The weights of expert 0 to 3 are 0.5, 1.25, 0.25 and 0 of 2.
    assert after((dense,), show=["expert_load", "dropped_fraction"]) == wanted(
        expert_load=[0.25, 0.625, 0.125, 0], dropped_fraction=0
    )


def test_choices_of_experts_by_hand():
    # Of four tokens the first is padding and the second NaN. Expert 0 has the two
    # others, expert 1 the last one and an empty slot: loads 2 and 1. Nobody is left
    # out; of the third and fourth without expert 0's first choice one of two is.
    probs = np.array([[1.0, 0.0], [np.nan, 0.0], [0.5, 0.5], [1.0, 0.0]])
    mask = np.array([False, True, True, True])
    invalid = np.array([False, True, False, False])
    record = ExpertChoiceRouting(
        np.array([[2, 3], [3, 4]]), np.ones((2, 2)), probs, probs, mask, invalid
    )
    expected = wanted(
        expert_load=[2 / 3, 1 / 3],
        load_cv=1 / 3,
        dropped_fraction=0,
        router_entropy=LOG2 / 2,
        router_confidence=0.75,
    )
    assert after((record,), num_experts=2) == expected
    left_out = record._replace(token_indices=np.array([[3, 4], [3, 4]]))
    assert after((left_out,), num_experts=2, show=["dropped_fraction"]) == wanted(
        dropped_fraction=0.5
    )


def test_a_mixture_of_all_by_hand():
    # Weights 1.25, 2, 0.5 and 0.25 of 4: mean 1, variance
    # (0.0625 + 1 + 0.25 + 0.5625) / 4 = 0.46875
    assert after((DenseRouting(PROBS, PROBS, PROBS),)) == wanted(
        expert_load=[1.25 / 4, 2 / 4, 0.5 / 4, 0.25 / 4],
        load_cv=math.sqrt(0.46875),
        dropped_fraction=0,
        router_entropy=4.5 * LOG2 / 4,
        router_confidence=2.25 / 4,
    )


def test_batches_are_pooled_and_not_averaged():
    kept = np.array([[True, False], [True, True], [True, True], [False, True]])
    batches = [
        (chosen(np.array([True, False, False, False])), kept),
        (chosen(np.array([False, True, True, True])), kept),
    ]
    assert after(*batches) == wanted(**after((chosen(), kept)))
    assert after(*batches) != wanted(**after(batches[0]))


def test_reset_and_nothing_counted_give_zeros():
    nothing = wanted(
        expert_load=[0, 0, 0, 0],
        load_cv=0,
        dropped_fraction=0,
        router_entropy=0,
        router_confidence=0,
    )
    metric = RoutingMetrics(4, ALL)
    assert figures(metric) == nothing
    metric.update_state(chosen(), np.zeros((4, 2), bool))
    assert figures(metric) != nothing
    metric.reset_state()
    assert figures(metric) == nothing
    nobody = np.zeros(4, bool)
    empty = ExpertChoiceRouting(
        np.full((4, 2), 4), np.zeros((4, 2)), PROBS, PROBS, nobody, nobody
    )
    no_token = chosen(probs=PROBS[:0], indices=CHOICES[:0])
    dense = DenseRouting(PROBS, PROBS, PROBS, nobody)
    assert after((chosen(nobody),), (empty,), (no_token,), (dense,)) == nothing


def test_an_expert_without_probabilities_has_load_and_drops():
    without = sorted({*ALL} - RoutingMetrics.NEEDS_PROBS)
    record = chosen(np.array([True, True, True, False]), probs=None)
    # Loads 2, 3, 1, 0 of 6: mean 1.5, variance (0.25 + 2.25 + 0.25 + 2.25) / 4
    assert after((record,), show=without) == wanted(
        expert_load=[2 / 6, 3 / 6, 1 / 6, 0],
        load_cv=math.sqrt(1.25) / 1.5,
        dropped_fraction=0,
    )
    assert after((chosen(probs=None),), show=["dropped_fraction"]) == wanted(
        dropped_fraction=0
    )


def test_only_what_is_shown_is_kept():
    metric = RoutingMetrics(4, ["router_entropy", "load_cv"], prefix="first")
    assert list(metric.result()) == ["first_router_entropy", "first_load_cv"]
    assert sorted(v.name for v in metric.sums) == ["entropy", "load", "tokens"]
    assert RoutingMetrics(4, []).result() == {}


def test_config():
    metric = RoutingMetrics(3, ("load_cv",), prefix="a", name="b")
    config = keras.saving.serialize_keras_object(metric)
    assert config["registered_name"] == "keras_moe>RoutingMetrics"
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == metric.get_config()
    assert (again.num_experts, again.show, again.name) == (3, ("load_cv",), "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, ["load_cv"]), "`num_experts`.*0"),
        ((2, ["load"]), "`show` must hold names from 'expert_load'.*'load'"),
        ((2, "load_cv"), "`show` must be a sequence.*'load_cv'"),
        ((2, None), "`show` must be a sequence.*None"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RoutingMetrics(*arguments)


# In a layer


class Watched(Layer):
    """A router whose tokens are its logits, and its figures."""

    def __init__(self, show=ALL, **kwargs):
        super().__init__(**kwargs)
        self.router = TopKRouter(4, 2, kernel_initializer="identity")
        self.routing_metrics = RoutingMetrics(4, show, state_of=self)

    def build(self, input_shape):
        self.router.build(input_shape)

    def call(self, x):
        record = self.router(x)
        kept = ops.equal(record.expert_indices, record.expert_indices[:, :1])
        self.routing_metrics.update_state(record, kept)
        return record.combine_weights

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 2)


def watched_model(**kwargs):
    layer = Watched(**kwargs)
    # Twice nested: the sums must be found from outside.
    inner = keras.Sequential([keras.Input((4,)), layer])
    model = keras.Sequential([keras.Input((4,)), inner])
    return layer, model


def expected_figures(x):
    indices = np.argsort(-x, axis=1, kind="stable")[:, :2]
    probs = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    return after((Routing(indices, indices, None, probs), indices == indices[:, :1]))


COMPILERS = (False,) if keras.backend.backend() == "torch" else (False, True)


@pytest.mark.parametrize("jit", COMPILERS)
def test_fit_and_evaluate_show_the_figures_of_all_batches(jit):
    layer, model = watched_model()
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit)
    x = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
    y = np.zeros((20, 2), "float32")
    # Batches of 8, 8 and 4: a mean of means would be another number.
    history = model.fit(
        x, y, batch_size=8, epochs=2, validation_data=(x[:9], y[:9]), verbose=0
    ).history
    for name, value in expected_figures(x).items():
        assert history[f"moe_{name}"] == pytest.approx([value] * 2)
    for name, value in expected_figures(x[:9]).items():
        assert history[f"val_moe_{name}"] == pytest.approx([value] * 2)
    found = model.evaluate(x[:13], y[:13], batch_size=5, verbose=0, return_dict=True)
    for name, value in expected_figures(x[:13]).items():
        assert found[f"moe_{name}"] == pytest.approx(value)
    assert len(model.metrics) == 2
    # Sums are no weights and go into no file.
    assert [w.name for w in layer.weights] == ["kernel"]


@pytest.mark.parametrize("jit", [pytest.param(False, marks=not_on_jax), *COMPILERS[1:]])
def test_fit_shows_the_figures_of_a_moe(jit, capsys):
    layer = MoE(4, (3, 2), 1, capacity_factor=0.5, routing_metrics=ALL, name="moe")
    model = keras.Sequential([keras.Input(batch_shape=(8, 3)), layer])
    layer.router.kernel.assign(np.zeros((3, 4)))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit)
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    history = model.fit(x, x[:, :2], batch_size=8, epochs=1, verbose=2).history
    # All 8 tokens of a batch want expert 0, which has 0.5 * 1 * 8 / 4 = 1 slot.
    # Loads 8, 0, 0, 0: mean 2, variance (36 + 4 + 4 + 4) / 4 = 12, CV sqrt(12) / 2.
    figures = {
        "moe_expert_load_0": 1.0,
        "moe_expert_load_1": 0.0,
        "moe_expert_load_2": 0.0,
        "moe_expert_load_3": 0.0,
        "moe_load_cv": math.sqrt(3.0),
        "moe_dropped_fraction": 7 / 8,
        "moe_router_entropy": 2 * LOG2,
        "moe_router_confidence": 0.25,
    }
    shown = capsys.readouterr().out
    assert sorted(history) == sorted([*figures, "loss"])
    for name, value in figures.items():
        assert history[name] == [pytest.approx(value, abs=1e-6)]
        assert f"{name}: {value:.4f}" in shown


def test_sums_are_exact_under_a_mixed_policy():
    layer = Watched(show=["load_cv", "router_confidence"], dtype="mixed_bfloat16")
    x = np.tile([4.0, 3.0, 0.0, 0.0], (200, 1)).astype("float32")
    for _ in range(3):
        layer(x)
    sums = {v.name: ops.convert_to_numpy(v) for v in layer.routing_metrics.sums}
    assert sums["load"].tolist() == [600, 600, 0, 0]
    assert sums["tokens"] == 600


def test_compiled_equals_eager():
    tensors = [ops.convert_to_tensor(v) for v in (CHOICES, PROBS)]
    slots = ops.convert_to_tensor([[0, 3], [1, 4], [1, 4], [4, 4]])
    mask = ops.convert_to_tensor(np.array([True, True, False, True]))

    class Figures(keras.layers.Layer):
        def call(self, indices, probs, slots, mask):
            metric = self.metric
            metric.update_state(Routing(indices, indices, None, probs, mask))
            metric.update_state(
                ExpertChoiceRouting(slots, slots, probs, probs, mask, None)
            )
            metric.update_state(DenseRouting(probs, probs, probs, mask))
            return list(metric.result().values())

    def fresh():
        layer = Figures()
        layer.metric = RoutingMetrics(4, ALL)
        return layer

    expected = [float(v) for v in fresh()(*tensors, slots, mask)]
    names = backends.compiled_calls(fresh())
    for name in names:
        # On JAX what a compiled call leaves in a variable is nothing to read.
        call = backends.compiled_calls(fresh())[name]
        found = [float(v) for v in call(*tensors, slots, mask)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        layer = fresh()
        call = tf.function(
            lambda *inputs: layer(*inputs),
            [
                tf.TensorSpec([None, 2], "int64"),
                tf.TensorSpec([None, 4], "float64"),
                tf.TensorSpec([4, 2], slots.dtype),
                tf.TensorSpec([None], "bool"),
            ],
        )
        found = [float(v) for v in call(*tensors, slots, mask)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


# Arguments: records that do not agree.


EXPERTS_CHOOSE = ExpertChoiceRouting(
    np.array([[0, 1], [1, 2], [3, 4], [2, 0]]), np.ones((4, 2)), PROBS, PROBS
)
DENSE = DenseRouting(PROBS, PROBS, PROBS)
RECORDS = {
    "Routing": chosen(np.ones(4, bool))._replace(
        router_logits=PROBS, choice_probs=PROBS
    ),
    "ExpertChoiceRouting": EXPERTS_CHOOSE._replace(
        mask=np.ones(4, bool), invalid=np.zeros(4, bool)
    ),
    "DenseRouting": DENSE._replace(mask=np.ones(4, bool)),
}
FIELDS = {
    "Routing": {
        "expert_indices": "(n, k)",
        "combine_weights": "(n, k)",
        "router_logits": "(n, e)",
        "router_probs": "(n, e)",
        "mask": "(n,)",
        "choice_probs": "(n, e)",
    },
    "ExpertChoiceRouting": {
        "token_indices": "(e, c)",
        "combine_weights": "(e, c)",
        "router_logits": "(n, e)",
        "router_probs": "(n, e)",
        "mask": "(n,)",
        "invalid": "(n,)",
    },
    "DenseRouting": {
        "combine_weights": "(n, e)",
        "router_logits": "(n, e)",
        "router_probs": "(n, e)",
        "mask": "(n,)",
    },
}
OF_FIELDS = [(kind, field) for kind in FIELDS for field in FIELDS[kind]]


def refused(message, *arguments, show=ALL, num_experts=4):
    with pytest.raises(ValueError, match=re.escape(message)):
        RoutingMetrics(num_experts, show).update_state(*arguments)


@pytest.mark.parametrize("kind", RECORDS)
def test_every_field_of_a_record_is_tested_for_its_shape(kind):
    record = RECORDS[kind]
    assert set(record._fields) == set(FIELDS[kind])
    after((record,))


@pytest.mark.parametrize(("kind", "field"), OF_FIELDS)
def test_other_ranks_are_refused(kind, field):
    legal = getattr(RECORDS[kind], field)
    for other in (legal[0], legal[None], legal[..., None]):
        message = (
            f"`routing.{field}` must have the shape {FIELDS[kind][field]}. "
            f"Received: routing.{field} of shape {np.shape(other)}"
        )
        refused(message, RECORDS[kind]._replace(**{field: other}))


@pytest.mark.parametrize(("kind", "field"), OF_FIELDS)
def test_fields_that_do_not_agree_are_refused(kind, field):
    legal = getattr(RECORDS[kind], field)
    for axis in range(legal.ndim):
        other = np.take(legal, [0, 1, 1], axis)
        if other.shape[1:] == (3,) and field in ("expert_indices", "token_indices"):
            continue  # The first to have k or c: the weights are then refused.
        refused(" as in `", RECORDS[kind]._replace(**{field: other}))


@pytest.mark.parametrize("kind", RECORDS)
def test_another_number_of_experts_is_refused(kind):
    message = "with e=3 as in `num_experts`. Received: routing."
    refused(message, RECORDS[kind], num_experts=3)


@pytest.mark.parametrize("kept", [(1, 2), (4, 1), (4, 3), (2,), (4, 2, 1)])
def test_kept_of_another_shape_is_refused(kept):
    message = f"Received: kept of shape {kept}"
    refused(message, chosen(), np.ones(kept, bool))
    refused("`kept` must have the shape (n, k)", chosen(), np.ones(kept, bool))


def test_kept_is_for_tokens_that_choose():
    for record in (EXPERTS_CHOOSE, DENSE):
        refused("`kept` must be None unless", record, np.ones((4, 2), bool))


def test_what_is_no_record_is_refused():
    for other in (PROBS, None, (CHOICES, PROBS)):
        message = f"Received: routing of type {type(other).__name__}"
        refused(message, other)


def test_swapped_fields_are_refused():
    message = "`routing.expert_indices` must hold integers. Received: "
    refused(message, Routing(np.ones((4, 2)), CHOICES, None, PROBS))
    message = "`routing.token_indices` must hold integers. Received: "
    refused(message, EXPERTS_CHOOSE._replace(token_indices=np.ones((4, 2))))


def test_missing_probabilities_are_refused():
    message = "must have router_probs for the figures ['router_entropy']"
    refused(message, chosen(probs=None), show=["load_cv", "router_entropy"])
    without = EXPERTS_CHOOSE._replace(router_probs=None)
    refused("`routing` must have router_probs or a mask", without, show=["load_cv"])


def test_lists_and_a_record_without_weights_are_taken():
    lists = Routing(CHOICES.tolist(), None, None, PROBS.tolist(), [True] * 4)
    kept = np.eye(4, 2) > 0
    assert after((lists, kept.tolist())) == wanted(**after((chosen(), kept)))
    show = ["expert_load"]
    without = Routing(CHOICES, None)
    assert after((without,), show=show) == wanted(**after((chosen(),), show=show))
