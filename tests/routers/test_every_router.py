"""What every router promises: configs, files, precision, masks, compilers, sizes."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import routers
from tests.support import backends
from tests.support.router_cases import (
    ALL,
    MASK,
    WITH_KERNEL,
    Fields,
    array,
    arrays,
    assert_equal,
    feed,
    make,
    model_of,
    on_logits,
    takes_unknown_n,
    tokens,
)

TOKEN_CHOICE = [
    name
    for name, kind in routers.KNOWN.items()
    if kind.choice == "token" and name != "hash"
]
EVERY = [
    *[(name, {}) for name in ALL],
    ("hash", {"vocabulary_size": 50}),
    ("bias_balanced", {"num_groups": 2, "top_k_groups": 1}),
    ("hierarchical", {"top_k_groups": 1, "top_k_experts": 2, "use_bias": True}),
    ("top_k", {"score_function": "sigmoid", "use_bias": True, "jitter": 0.2}),
]


def test_the_table_of_routers_is_consistent():
    every = {"load_balancing", "importance", "load", "router_z", "entropy"}
    for name, router in routers.KNOWN.items():
        assert router.choice in ("token", "expert", "all")
        assert set(router.default_loss_weights) <= router.supported_losses <= every
        assert make(name).top_k == (4 if name == "dense" else 2)
    # `losses` stays what it is in every Keras layer.
    regular = on_logits(make("top_k", kernel_regularizer=keras.regularizers.L2(0.5)))
    assert [float(array(loss)) for loss in regular.losses] == pytest.approx([0.5 * 4])


@pytest.mark.parametrize(("name", "kwargs"), EVERY)
def test_config_and_file(name, kwargs, tmp_path):
    router = make(name, name="given", trainable=False, **kwargs)
    config = keras.saving.serialize_keras_object(router)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(router)
    assert keras.saving.serialize_keras_object(again) == config
    assert config["registered_name"].startswith("keras_moe>")
    assert (again.name, again.trainable) == ("given", False)
    x = feed(name)
    if not takes_unknown_n(name):
        pytest.skip("this backend fixes every shape in advance")
    model = model_of(make(name, **kwargs), x)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_equal(loaded(x), model(x), rtol=0)


def test_every_argument_is_in_the_config():
    given = {
        "top_k": {"score_function": "sigmoid", "renormalize": False, "jitter": 0.1},
        "noisy_top_k": {"noise_kernel_initializer": "ones", "seed": 3},
        "bias_balanced": {"routed_scaling_factor": 2.5, "bias_update_rate": 0.01},
        "expert_choice": {"capacity_factor": 1.25, "use_bias": True},
        "sinkhorn": {"iterations": 3, "temperature": 0.5, "renormalize": False},
        "hash": {"vocabulary_size": 9, "seed": 4},
        "dense": {"temperature": 0.5, "kernel_initializer": "he_normal"},
        "hierarchical": {"top_k_groups": 1, "top_k_experts": 2, "use_bias": True},
    }
    for name, kwargs in given.items():
        router = make(name, **kwargs)
        again = type(router).from_config(router.get_config())
        for key, value in kwargs.items():
            if not key.endswith("initializer"):
                assert getattr(again, key) == value
        assert again.get_config() == router.get_config()


@pytest.mark.parametrize("name", ALL)
def test_routing_is_float32_under_any_policy(name):
    x = ops.cast(feed(name), "int32" if name == "hash" else "bfloat16")
    reference = make(name)
    expected = list(arrays(reference(x)).values())
    for policy in ("mixed_bfloat16", "mixed_float16"):
        router = make(name, dtype=policy)
        router.build(x.shape)
        router.set_weights(reference.get_weights())
        # Neither the router's own autocast scope nor that of a layer around it may
        # take the low bits of the kernel.
        for found in (arrays(router(x)).values(), Fields(router)(x)):
            found = [array(value) for value in found]
            assert {value.dtype.name for value in found} <= {"float32", "int32", "bool"}
            assert_equal(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_padding_changes_no_other_token(name):
    x = feed(name)
    router = make(name)
    if name != "hash":
        x[~MASK] = np.nan
    for training in (False, True) if name == "sinkhorn" else (False,):
        alone = arrays(router(x[MASK], training=training))
        found = arrays(router(x, mask=MASK, training=training))
        assert (found.pop("mask") == MASK).all()
        if name == "expert_choice":
            n = len(x)
            chosen = {*found["token_indices"].ravel()}
            assert chosen <= {*np.flatnonzero(MASK), n}
            assert not found["invalid"].any()
            continue
        for field, values in alone.items():
            np.testing.assert_allclose(
                found[field][MASK], values, rtol=1e-5, atol=1e-6, err_msg=field
            )


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_nan_in_padding_reaches_no_gradient(name):
    x = tokens()
    x[~MASK] = np.nan
    layer = Fields(make(name), training=True, mask=MASK, floats=True)
    cotangents = [np.ones(v.shape, "float32") for v in layer(x)]
    by_weight, by_input = backends.gradients(layer, [x], cotangents)
    assert all(np.isfinite(gradient).all() for gradient in by_weight)
    assert (by_input[0][~MASK] == 0).all()


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_nan_and_infinity_stay_in_their_rows(name):
    x = tokens()
    broken = x.copy()
    broken[2], broken[5, 1] = np.nan, np.inf
    others = np.array([0, 1, 3, 4, 6])
    router = make(name)
    router.build(x.shape)
    # In training an expert's and a batch's choice would depend on the other rows.
    layer = Fields(router)
    fields = list(arrays(router(x)))
    expected = [array(v) for v in layer(x)]
    runs = {"eager": layer, **backends.compiled_calls(layer)}
    for run in runs.values():
        values = map(array, run(ops.convert_to_tensor(broken)))
        found = dict(zip(fields, values, strict=True))
        if name == "expert_choice":
            assert np.flatnonzero(found["invalid"]).tolist() == [2, 5]
            assert not {2, 5} & set(found["token_indices"].ravel())
            assert np.isfinite(found["combine_weights"]).all()
            continue
        if "expert_indices" in found:
            assert found["expert_indices"].min() >= 0
            assert found["expert_indices"].max() < 4
        for field, values in zip(fields, expected, strict=True):
            np.testing.assert_allclose(
                found[field][others], values[others], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("name", ALL)
def test_compiled_equals_eager(name):
    x = ops.convert_to_tensor(feed(name))
    training = name in ("sinkhorn", "expert_choice")
    layer = Fields(make(name), training)
    expected = [array(v) for v in layer(x)]
    for call in backends.compiled_calls(layer).values():
        assert_equal(call(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "kwargs"), EVERY)
def test_any_number_of_tokens(name, kwargs):
    router = make(name, **kwargs)
    x = feed(name)
    if takes_unknown_n(name):
        model = model_of(router, x)
        for n in (1, 2, 7):
            found = model.predict_on_batch(x[:n])
            assert_equal(found, [array(v) for v in Fields(router)(x[:n])], rtol=1e-5)
    for training in (False, True):
        record = arrays(router(x[:0], training=training))
        for field, values in record.items():
            if router.choice == "expert" and values.shape[0] == 4:
                assert values.tolist() == [[0]] * 4, field
            else:
                assert values.shape[0] == 0, field


@pytest.mark.parametrize("name", routers.KNOWN)
def test_one_expert(name):
    if name == "noisy_top_k":
        pytest.skip("takes two")
    kwargs = {} if name == "dense" else {"top_k": 1}
    router = make(name, 1, **kwargs)
    x = feed(name)
    record = arrays(router(x, training=True))
    if name != "bias_balanced":
        assert (record["combine_weights"] == 1).all()
    if name != "hash":
        # Every weight has a gradient, if only of zeros.
        layer = Fields(router, floats=True)
        cotangents = [np.ones(v.shape, "float32") for v in layer(x)]
        backends.gradients(layer, [x], cotangents)


# Few different sizes, since JAX compiles every operation again for each.
@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(TOKEN_CHOICE),
    n=st.sampled_from([1, 2, 7]),
    e=st.sampled_from([2, 6]),
    training=st.booleans(),
    broken=st.sampled_from([0.0, np.nan, np.inf, -np.inf]),
    data=st.data(),
)
def test_choices_are_different_experts_for_any_sizes(
    name, n, e, training, broken, data
):
    k = data.draw(st.sampled_from([2, e - 1, e]).filter(lambda k: k > 1))
    x = np.random.default_rng(n).normal(size=(n, e)).round(1).astype("float32")
    x[n // 2, e // 2] = broken
    record = arrays(on_logits(make(name, e, top_k=k))(x, training=training))
    chosen = record["expert_indices"]
    assert chosen.shape == (n, k)
    assert chosen.dtype == np.int32
    assert ((chosen >= 0) & (chosen < e)).all()
    assert all(len(set(row)) == k for row in chosen)
    whole = np.delete(record["combine_weights"], n // 2, axis=0)
    np.testing.assert_allclose(whole.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("top_k", {"num_experts": 0}, "`num_experts`.*0"),
        ("top_k", {"top_k": 5}, "`top_k` must not exceed.*top_k=5, num_experts=4"),
        ("top_k", {"top_k": 1.0}, "`top_k`.*1.0"),
        ("top_k", {"score_function": "relu"}, "`score_function`.*'relu'"),
        ("top_k", {"renormalize": 1}, "`renormalize` must be True or False.*1"),
        ("top_k", {"jitter": 1}, "`jitter`.*1"),
        ("bias_balanced", {"num_groups": 3}, "`num_groups` must divide.*num_groups=3"),
        (
            "bias_balanced",
            {"num_groups": 2, "top_k_groups": 3},
            "`top_k_groups` must not exceed.*top_k_groups=3",
        ),
        (
            "bias_balanced",
            {"num_groups": 4, "top_k_groups": 1},
            "`top_k` must not exceed the number of experts.*top_k=2",
        ),
        ("bias_balanced", {"routed_scaling_factor": 0}, "`routed_scaling_factor`.*0"),
        ("bias_balanced", {"bias_update_rate": -1}, "`bias_update_rate`.*-1"),
        ("expert_choice", {"capacity_factor": 0.0}, "`capacity_factor`.*0.0"),
        ("sinkhorn", {"iterations": 0}, "`iterations`.*0"),
        ("sinkhorn", {"temperature": 0}, "`temperature`.*0"),
        ("hash", {"vocabulary_size": 0}, "`vocabulary_size`.*0"),
        ("hash", {"seed": -1}, "`seed`.*-1"),
        ("dense", {"temperature": -1}, "`temperature`.*-1"),
    ],
)
def test_bad_arguments_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(name, **{"num_experts": 4, **arguments})


RENORMALISED = [
    ("top_k", {"renormalize": True}),
    ("top_k", {"renormalize": True, "score_function": "sigmoid"}),
    ("bias_balanced", {"renormalize": True}),
    ("sinkhorn", {"renormalize": True}),
    ("noisy_top_k", {}),
]


@pytest.mark.parametrize(("name", "arguments"), RENORMALISED)
def test_a_single_renormalised_weight_is_for_inference(name, arguments):
    """As in a Mixtral with one expert a token, whose weights were trained elsewhere."""
    router = make(name, top_k=1, **arguments)
    record = router(tokens())
    np.testing.assert_allclose(array(record.combine_weights), 1, rtol=1e-6)
    best = np.argmax(array(record.router_logits), axis=1)
    np.testing.assert_array_equal(array(record.expert_indices)[:, 0], best)
    rule = "`top_k` must be >= 2" if name == "noisy_top_k" else "`renormalize` must be"
    with pytest.raises(ValueError, match=f"{rule}.*{type(router).__name__}.*top_k=1"):
        router(tokens(), training=True)
    router.kernel.trainable = False
    router(tokens(), training=True)
    router.kernel.trainable = True
    router.trainable = False
    found = router(tokens(), training=True).combine_weights
    np.testing.assert_allclose(array(found), 1, rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_router_in_a_functional_model(name):
    router = make(name)
    shape, dtype = ((), "int32") if name == "hash" else ((5,), "float32")
    inputs = keras.Input(shape, dtype=dtype)
    record = router(inputs)
    model = keras.Model(inputs, {n: getattr(record, n) for n in record._fields})
    x = np.arange(7, dtype="int32") if name == "hash" else tokens()
    expected = arrays(router(x))
    assert set(expected) == set(record._fields)
    config = keras.Model.from_config(model.get_config())
    config.set_weights(model.get_weights())
    for functional in (model, config):
        found = functional.predict(x, verbose=0)
        for field, value in expected.items():
            np.testing.assert_allclose(found[field], value, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings(
    "ignore:Layer 'functional:UserWarning"
)  # No mask leaves it.
@pytest.mark.parametrize(
    ("name", "field"), [("noisy_top_k", "choice_probs"), ("expert_choice", "invalid")]
)
def test_a_mask_added_later_keeps_the_order_of_fields(name, field):
    """A functional model takes the fields of a record by their places."""
    router = make(name)
    inputs = keras.Input((5,))
    inner = keras.Model(inputs, {"field": getattr(router(inputs), field)})
    outer_inputs = keras.Input((5,))
    masked = keras.layers.Masking()(outer_inputs)
    outer = keras.Model(outer_inputs, inner(masked))
    expected = array(inner(tokens())["field"])
    np.testing.assert_array_equal(array(outer(tokens())["field"]), expected)


def test_tokens_of_another_shape_are_refused():
    router = make("top_k")
    router(tokens())
    with pytest.raises(ValueError, match="axis -1"):
        router(tokens(7, 6))
    with pytest.raises(ValueError, match="ndim=2"):
        router(np.ones((2, 3, 5)))
    with pytest.raises(ValueError, match="rank >= 2"):
        make("top_k")(np.ones(5))


@pytest.mark.parametrize("name", ALL)
def test_the_attributes_of_a_router_describe_its_record(name):
    router = make(name)
    record = arrays(router(feed(name)))
    assert router.has_probs == ({"router_logits", "router_probs"} <= set(record))
    assert router.reads_ids == ("int" in str(feed(name).dtype))
