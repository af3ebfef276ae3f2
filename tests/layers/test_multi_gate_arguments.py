"""Arguments and inputs of MMoE, and experts written by users."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.experts import LayerExperts, MLPExperts
from keras_moe.layers import MMoE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, r"`num_experts` must be an integer >= 1.*0"),
        ({"num_experts": 2.0}, r"`num_experts` must be an integer >= 1.*2\.0"),
        ({"expert_units": ()}, "`expert_units` must name at least one layer"),
        ({"expert_units": (4, -1)}, r"`expert_units\[1\]` must be .*-1"),
        ({"expert_units": "64"}, "`expert_units` must be an integer or a sequence"),
        ({"expert_units": None}, "`expert_units` must be given.*or `experts`"),
        ({"tasks": 0}, "`tasks` must be an integer >= 1"),
        ({"tasks": []}, "`tasks` must name at least one task"),
        ({"tasks": "click"}, "`tasks` must be a number of tasks or a sequence"),
        ({"tasks": ["a", "a"]}, "must be unique. Received 'a' more than once"),
        ({"tasks": ["a b"]}, "Received: 'a b'"),
        ({"tasks": ["a/b"]}, "Received: 'a/b'"),
        ({"tasks": ["_a"]}, "must start with a letter"),
        ({"top_k": 4}, "`top_k` must not exceed `num_experts`.*top_k=4.*=3"),
        ({"top_k": 0}, "`top_k` must be an integer >= 1"),
        ({"shared_top_k": 1}, "`top_k` must be given with `shared_top_k`.*top_k=None"),
        ({"shared_top_k": 0, "top_k": 1}, "`shared_top_k` must be an integer >= 1"),
        ({"shared_top_k": 1, "top_k": -1}, "`top_k` must be an integer >= 0.*-1"),
        (
            {"shared_top_k": 2, "top_k": 2},
            r"`shared_top_k` \+ `top_k` must not exceed `num_experts`.*=2.*=2.*=3",
        ),
        (
            {"load_balancing_loss_weight": 0.1},
            "`load_balancing_loss_weight` must be 0 with top_k=None.*0.1",
        ),
        (
            {"load_balancing_loss_weight": "0.1", "top_k": 1},
            "`load_balancing_loss_weight` must be a finite number",
        ),
        ({"gate_units": (0,)}, r"`gate_units\[0\]`"),
        ({"gate_temperature": 0.0}, "`gate_temperature` must be a finite number > 0"),
        ({"gate_temperature": float("nan")}, "`gate_temperature`"),
        ({"gate_dropout": 1.0}, r"`gate_dropout` must be in \[0, 1\).*1\.0"),
        ({"gate_dropout": "0.1"}, "`gate_dropout` must be a number"),
        ({"dropout": -0.1}, "`dropout`"),
        ({"experts": 3, "expert_units": None}, "`experts` must be a Keras layer"),
        ({"experts": MLPExperts(3, 4)}, "`expert_units` must be None"),
        (
            {"experts": [MLPExperts(3, 4)], "expert_units": None},
            "`experts` must be one layer",
        ),
        ({"dispatch": "fast"}, "`dispatch` must be one of.*'blocked'.*'fast'"),
        ({"dispatch": "capacity"}, "`dispatch` must be one of.*'capacity'"),
        ({"dispatch": "split"}, "`dispatch` must be .*top_k=None.*'split'"),
        (
            {
                "experts": LayerExperts([keras.layers.Dense(4) for _ in range(3)]),
                "expert_units": None,
                "top_k": 1,
                "dispatch": "blocked",
            },
            "`dispatch` must not be 'blocked'.*LayerExperts",
        ),
        (
            {"experts": MLPExperts(2, 4), "expert_units": None},
            "num_experts=3, experts.num_experts=2",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = {"num_experts": 3, "expert_units": 4, "tasks": ["a", "b"]}
    with pytest.raises(ValueError, match=message):
        MMoE(**{**good, **arguments})


def test_gate_inputs_of_another_batch_are_refused():
    layer = MMoE(3, 4, 2)
    with pytest.raises(ValueError, match=r"`gate_inputs`.*\(5, 6\).*\(4, 2\)"):
        layer(np.ones((5, 6)), np.ones((4, 2)))


@keras.saving.register_keras_serializable("tests")
class _PlainExperts(keras.layers.Layer):
    """What a user writes: sublayers and a `call`, nothing more."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [keras.layers.Dense(4), keras.layers.Dense(4)]

    def call(self, inputs):
        return ops.stack([part(inputs) for part in self.parts], axis=-2)


def test_experts_may_be_any_layer():
    layer = MMoE(2, None, ["a", "b"], experts=_PlainExperts())
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    assert layer.compute_output_shape(x.shape) == {"a": (3, 4), "b": (3, 4)}
    outputs = layer(x)
    weights = ops.convert_to_numpy(layer.gate_weights(x))
    first, second = (ops.convert_to_numpy(p(x)) for p in layer.experts.parts)
    expected = weights[:, 0, :1] * first + weights[:, 0, 1:] * second
    np.testing.assert_allclose(
        ops.convert_to_numpy(outputs["a"]), expected, rtol=1e-4, atol=1e-6
    )
    symbolic = layer(keras.Input((6,)))
    assert symbolic["b"].shape == (None, 4)


def test_experts_of_another_shape_are_refused():
    layer = MMoE(2, None, 2, experts=keras.layers.Dense(4))
    with pytest.raises(ValueError, match=r"`experts` must map .* instead of"):
        layer(np.ones((5, 6)))


@pytest.mark.parametrize("shape", [(4,), (None, None)])
def test_inputs_without_a_feature_axis_are_refused(shape):
    with pytest.raises(ValueError, match="Received an input of shape"):
        MMoE(3, 4, 2).build(shape)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="an unknown batch is TensorFlow's"
)
@pytest.mark.parametrize("dispatch", ["dense", "split"])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_gate_inputs_of_another_batch_fail_where_only_the_run_knows(dispatch, rows):
    import tensorflow as tf

    layer = MMoE(4, 4, 2, top_k=1, dispatch=dispatch)
    x = np.ones((4, 6), "float32")
    signature = [tf.TensorSpec((None, 6)), tf.TensorSpec((None, 2))]
    call = tf.function(lambda a, b: layer(a, gate_inputs=b), input_signature=signature)
    assert call(x, np.ones((4, 2), "float32"))[0].shape == (4, 4)
    with pytest.raises(tf.errors.InvalidArgumentError, match="`gate_inputs` must have"):
        call(x, np.ones((rows, 2), "float32"))


def test_tasks_without_an_order_are_refused():
    with pytest.raises(ValueError, match="sequence of task names, in order"):
        MMoE(2, 4, {"click", "buy"})
    with pytest.raises(ValueError, match="sequence of task names, in order"):
        MMoE(2, 4, {"click": 1, "buy": 2})
    assert len(MMoE(2, 4, np.int64(2)).compute_output_shape((1, 3))) == 2
