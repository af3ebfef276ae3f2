import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import losses, routers, routing
from tests import backends, oracles, routing_oracles

# The arguments of a hierarchical router are others, hence it is not among the known.
ALL = [*routers.KNOWN, "hierarchical"]
WITH_KERNEL = [name for name in ALL if name != "hash"]
TOKEN_CHOICE = [name for name, kind in routers.KNOWN.items() if kind.choice == "token"]
TOKEN_CHOICE.remove("hash")
MASK = np.array([True, True, False, True, True, False, True])
EXPERT_BIAS = np.array([0.3, -0.2, 0.1, 0.0, -0.4, 0.25])


def make(kind, num_experts=4, **kwargs):
    if kind == "hierarchical":
        kwargs = {"top_k_groups": 2, "top_k_experts": 1, **kwargs}
        return routers.HierarchicalRouter(2, num_experts // 2, **kwargs)
    if kind != "dense":
        kwargs.setdefault("top_k", 2)
    return routers.KNOWN[kind](num_experts, **kwargs)


def tokens(n=7, d=5):
    return np.random.default_rng(0).normal(size=(n, d)).astype("float32")


def array(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


def arrays(record):
    """The fields of a record that are not None."""
    found = {name: v for name, v in record._asdict().items() if v is not None}
    return {name: array(v) for name, v in found.items()}


def on_logits(router):
    """Give the router the identity as its kernel, so that tokens are logits."""
    router.build((None, router.num_experts))
    router.kernel.assign(np.eye(router.num_experts))
    return router


def logit(scores):
    scores = np.asarray(scores)
    return np.log(scores / (1 - scores))


@keras.saving.register_keras_serializable("tests")
class Fields(keras.layers.Layer):
    """A router whose record comes as a list, for compilers, files and gradients."""

    def __init__(self, router, training=False, mask=None, floats=False, **kwargs):
        super().__init__(dtype=router.dtype_policy, **kwargs)
        self.router, self.training = router, training
        self.mask, self.floats = mask, floats

    def build(self, input_shape):
        if not self.router.built:
            self.router.build(input_shape)

    def call(self, x):
        record = self.router(x, mask=self.mask, training=self.training)
        fields = [v for v in record if v is not None]
        if not self.floats:
            return fields
        return [v for v in fields if keras.backend.is_float_dtype(v.dtype)]

    def get_config(self):
        router = keras.saving.serialize_keras_object(self.router)
        return {"name": self.name, "router": router, "training": self.training}

    @classmethod
    def from_config(cls, config):
        router = keras.saving.deserialize_keras_object(config.pop("router"))
        return cls(router, **config)


def oracle_of(name, kwargs, training, noise):
    """The oracle as a function of the tokens and the layer's weights in their order."""
    everybody = np.ones(len(noise), bool)
    options = {key: v for key, v in kwargs.items() if key not in ("seed", "use_bias")}
    k = options.pop("top_k", None)
    o = routing_oracles
    if name == "top_k":
        options.setdefault("renormalize", k > 1)
        return lambda x, kernel, bias=0.0: o.top_k(x, kernel, k, bias, **options)
    if name == "noisy_top_k":
        return lambda x, *kernels: o.noisy_top_k(x, *kernels, noise, k)
    if name == "bias_balanced":
        options["renormalize"] = k > 1
        return lambda x, kernel: o.bias_balanced(x, kernel, EXPERT_BIAS, k, **options)
    if name == "expert_choice":
        factor = options["capacity_factor"]
        return lambda x, kernel: o.expert_choice(x, kernel, k, factor, everybody)
    if name == "sinkhorn":
        steps = options["iterations"] if training else 0
        t = options.get("temperature", 1.0)
        return lambda x, w: o.sinkhorn(x, w, k, steps, t, k > 1, everybody)
    return lambda x, kernel: o.dense(x, kernel, options["temperature"])


GROUPS = {"num_groups": 3, "top_k_groups": 2, "routed_scaling_factor": 2.5}


@pytest.mark.parametrize(
    ("name", "kwargs", "training"),
    [
        ("top_k", {"top_k": 2}, True),
        ("top_k", {"top_k": 1}, True),
        ("top_k", {"top_k": 6, "renormalize": False, "use_bias": True}, False),
        ("top_k", {"top_k": 3, "score_function": "sigmoid", "use_bias": True}, True),
        ("top_k", {"top_k": 1, "score_function": "sigmoid"}, False),
        ("noisy_top_k", {"top_k": 2, "seed": 3}, True),
        ("noisy_top_k", {"top_k": 5, "seed": 4}, True),
        ("bias_balanced", {"top_k": 2}, True),
        ("bias_balanced", {"top_k": 3, **GROUPS}, False),
        ("bias_balanced", {"top_k": 1, "num_groups": 6, "top_k_groups": 2}, False),
        ("bias_balanced", {"top_k": 2, "score_function": "softmax"}, False),
        ("expert_choice", {"top_k": 2, "capacity_factor": 1.0}, True),
        ("expert_choice", {"top_k": 1, "capacity_factor": 0.7}, False),
        ("expert_choice", {"top_k": 6, "capacity_factor": 3.0}, False),
        ("sinkhorn", {"top_k": 2, "iterations": 7, "temperature": 0.5}, True),
        ("sinkhorn", {"top_k": 1, "iterations": 3}, True),
        ("sinkhorn", {"top_k": 1, "iterations": 3}, False),
        ("dense", {"temperature": 0.5}, False),
    ],
)
def test_record_and_gradients_equal_the_oracle(name, kwargs, training):
    x, rng = tokens().astype("float64"), np.random.default_rng(1)
    router = routers.KNOWN[name](6, dtype="float64", **kwargs)
    router.build(x.shape)
    weights = [rng.normal(size=w.shape) for w in router.trainable_variables]
    for variable, weight in zip(router.trainable_variables, weights, strict=True):
        variable.assign(weight)
    # The first draw of another generator with the router's seed is the router's.
    noise = keras.random.normal(
        (7, 6), dtype="float64", seed=keras.random.SeedGenerator(kwargs.get("seed"))
    )
    oracle = oracle_of(name, kwargs, training, array(noise))
    expected = oracle(x, *weights)

    def start():
        if name == "bias_balanced":
            router.expert_bias.assign(EXPERT_BIAS)
        if name == "noisy_top_k":
            fresh = keras.random.SeedGenerator(kwargs["seed"])
            router.seed_generator.state.assign(fresh.state)

    start()
    found = arrays(router(x, training=training))
    for field, values in expected.items():
        np.testing.assert_allclose(
            found.pop(field), values, **backends.tolerance(1e-6, 1e-9), err_msg=field
        )
    assert not found.pop("invalid", np.zeros(1)).any()
    assert not found

    start()
    fields = [field for field in expected if not field.endswith("indices")]
    cotangents = [rng.normal(size=expected[field].shape) for field in fields]
    layer = Fields(router, training, floats=True)
    layer.build(x.shape)
    by_weight, by_input = backends.gradients(layer, [x], cotangents)

    def scalar():
        record = oracle(x, *weights)
        return sum(
            (record[field] * c).sum()
            for field, c in zip(fields, cotangents, strict=True)
        )

    numeric = oracles.numeric_gradients(scalar, [x, *weights])
    for gradient, values in zip([*by_input, *by_weight], numeric, strict=True):
        np.testing.assert_allclose(gradient, values, **backends.tolerance(1e-4, 1e-7))


# By hand


def test_top_k_by_hand():
    x = np.log([[1.0, 4.0, 2.0, 3.0]])
    found = arrays(on_logits(make("top_k"))(x))
    assert found["expert_indices"].tolist() == [[1, 3]]
    np.testing.assert_allclose(found["router_probs"], [[0.1, 0.4, 0.2, 0.3]], 1e-6)
    np.testing.assert_allclose(found["combine_weights"], [[4 / 7, 3 / 7]], 1e-6)
    switch = arrays(on_logits(make("top_k", top_k=1))(x))
    np.testing.assert_allclose(switch["combine_weights"], [[0.4]], 1e-6)
    # sigmoid(log a) = a / (a + 1): 1/2, 4/5, 2/3, 3/4, together 163/60
    found = arrays(on_logits(make("top_k", score_function="sigmoid"))(x))
    np.testing.assert_allclose(found["combine_weights"], [[0.8 / 1.55, 0.75 / 1.55]])
    np.testing.assert_allclose(
        found["router_probs"], [[30 / 163, 48 / 163, 40 / 163, 45 / 163]], 1e-6
    )


def test_jitter_is_in_training_and_in_its_bounds():
    router = on_logits(make("top_k", jitter=0.1, seed=1))
    x = np.full((50, 4), 2.0)
    assert (array(router(x).router_logits) == 2.0).all()
    moved = array(router(x, training=True).router_logits)
    assert 1.8 <= moved.min() < 1.85
    assert 2.15 < moved.max() <= 2.2
    assert (moved != array(router(x, training=True).router_logits)).any()


def test_the_noise_is_in_training_only():
    router = on_logits(make("noisy_top_k"))
    x = tokens(7, 4)
    still = arrays(router(x))
    assert set(still) == {*routing.Routing._fields} - {"mask"}
    chosen = np.eye(4)[still["expert_indices"]].sum(axis=1)
    np.testing.assert_array_equal(still["choice_probs"], chosen)
    expected = arrays(on_logits(make("top_k"))(x))
    for field, values in expected.items():
        np.testing.assert_allclose(still[field], values, rtol=1e-6)
    assert (array(router(x, training=True).router_logits) != x).all()


def test_choice_probs_are_frequencies():
    """Draw the noise of one expert anew 20,000 times and see how often it is chosen."""
    router = on_logits(make("noisy_top_k", dtype="float64", seed=5))
    clean = np.array([[0.3, -0.2, 0.5, 0.0]])
    record = arrays(router(clean, training=True))
    noisy = record["router_logits"][0]
    rng = np.random.default_rng(0)
    for e in range(4):
        redrawn = np.tile(noisy, (20_000, 1))
        # A noise kernel of zeros: the deviation is softplus(0) = log 2.
        redrawn[:, e] = clean[0, e] + np.log(2) * rng.normal(size=20_000)
        chosen = (np.argsort(-redrawn, axis=1)[:, :2] == e).any(axis=1)
        # Four standard errors of a frequency, at most 4 sqrt(0.25 / 20000) = 0.014.
        assert chosen.mean() == pytest.approx(record["choice_probs"][0, e], abs=0.015)


def test_all_experts_are_chosen_with_certainty():
    record = on_logits(make("noisy_top_k", top_k=4))(tokens(3, 4), training=True)
    assert (array(record.choice_probs) == 1).all()


def test_groups_by_hand():
    # Sums of the two best of each group: 0.9 + 0.1, 0.6 + 0.5, 0.8 + 0.05
    x = logit([[0.9, 0.1, 0.6, 0.5, 0.8, 0.05]])
    options = {"num_experts": 6, "num_groups": 3, "routed_scaling_factor": 2.5}
    one = on_logits(make("bias_balanced", top_k_groups=1, **options))
    found = arrays(one(x))
    assert found["expert_indices"].tolist() == [[2, 3]]
    np.testing.assert_allclose(
        found["combine_weights"], [[2.5 * 0.6 / 1.1, 2.5 * 0.5 / 1.1]], 1e-5
    )
    # The two best groups have 0.9, 0.1, 0.6 and 0.5: the expert with 0.8 is out.
    two = on_logits(make("bias_balanced", top_k_groups=2, **options))
    assert array(two(x).expert_indices).tolist() == [[0, 2]]
    # A bias for all moves nothing, also where it makes every score negative.
    two.expert_bias.assign(np.full(6, -2.0))
    assert array(two(x).expert_indices).tolist() == [[0, 2]]
    # With 0.5 more for expert 4 the last group has 1.35: the best two are 1.3 and 0.6.
    two.expert_bias.assign([0, 0, 0, 0, 0.5, 0])
    found = arrays(two(x))
    assert found["expert_indices"].tolist() == [[4, 2]]
    # The weights know no bias: 0.8 and 0.6.
    np.testing.assert_allclose(
        found["combine_weights"], [[2.5 * 0.8 / 1.4, 2.5 * 0.6 / 1.4]], 1e-5
    )


def test_the_bias_follows_the_load_by_hand():
    router = on_logits(make("bias_balanced", top_k=1, bias_update_rate=0.125))
    x = 4 * np.eye(4)[[0, 0, 1, 0, 2]]
    router(x, training=False)
    assert (array(router.expert_bias) == 0).all()
    # Loads (3, 1, 1, 0), mean 1.25: one has more, three have less.
    router(x, training=True)
    assert array(router.expert_bias).tolist() == [-0.125, 0.125, 0.125, 0.125]
    # In the next step tokens 0 and 1 count, chosen once each: mean 0.5.
    optimizer_step(router)
    mask = np.array([True, False, True, False, False])
    router(x, mask=mask, training=True)
    assert array(router.expert_bias).tolist() == [-0.25, 0.0, 0.25, 0.25]
    # A token that is not finite does not count either, nor does an empty batch.
    for batch, counted in (
        (np.full((2, 4), np.nan), None),
        (x, np.zeros(5, bool)),
        (np.zeros((0, 4)), None),
    ):
        optimizer_step(router)
        router(batch, mask=counted, training=True)
    router.trainable = False
    optimizer_step(router)
    router(x, training=True)
    assert array(router.expert_bias).tolist() == [-0.25, 0.0, 0.25, 0.25]


def optimizer_step(router):
    """Change the kernel, by which a router knows that an optimizer has made a step."""
    router.kernel.assign(router.kernel * (1 + 2**-20))


def test_the_bias_moves_once_for_all_batches_of_a_step():
    """Loads (3, 1, 1, 0), then (0, 1, 1, 3), together (3, 2, 2, 3): mean 2.5.

    The second batch is routed by the bias of the beginning, and counted twice it would
    change no sign: (3, 3, 3, 6) has the mean 3.75, (3, 2, 2, 3) and its double 2.5, 5.
    """
    router = on_logits(make("bias_balanced", top_k=1, bias_update_rate=0.5))
    router.expert_bias.assign([0.0, 0.25, 0.0, 0.0])
    first, second = 4 * np.eye(4)[[0, 0, 1, 0, 2]], 4 * np.eye(4)[[1, 3, 3, 2, 3]]
    routed = [array(router(x).expert_indices) for x in (first, second)]
    for _ in range(2):  # The second time as recomputations.
        for x, expected in zip((first, second), routed, strict=True):
            found = array(router(x, training=True).expert_indices)
            np.testing.assert_array_equal(found, expected)
    assert array(router.expert_bias).tolist() == [-0.5, 0.75, 0.5, -0.5]
    optimizer_step(router)
    router(first, training=True)
    # The sigmoids differ by less than the bias: every token goes to expert 1.
    assert array(router.expert_bias).tolist() == [0.0, 0.25, 1.0, 0.0]


def test_a_bias_that_somebody_assigns_begins_a_step():
    router = on_logits(make("bias_balanced", top_k=1, bias_update_rate=0.125))
    x = 4 * np.eye(4)[[0, 0, 1, 0, 2]]
    router(x, training=True)
    router.expert_bias.assign([0.0, 0.0, 0.0, 0.5])
    router(x, training=True)
    assert array(router.expert_bias).tolist() == [0.125, 0.125, 0.125, 0.375]


def test_the_bias_follows_every_call_where_the_kernel_is_not_trained():
    router = on_logits(make("bias_balanced", top_k=1, bias_update_rate=0.125))
    router.kernel.trainable = False
    x = 4 * np.eye(4)[[0, 0, 1, 0, 2]]
    for _ in range(2):
        router(x, training=True)
    assert array(router.expert_bias).tolist() == [-0.25, 0.25, 0.25, 0.25]


def test_what_is_known_of_a_step_is_no_weight():
    router = on_logits(make("bias_balanced"))
    assert [v.name for v in router.weights] == ["kernel", "expert_bias"]
    assert len(router.variables) == 6
    assert len(on_logits(make("bias_balanced", bias_update_rate=0.0)).variables) == 2


def test_the_bias_balances_a_skewed_router():
    x = tokens(256, 4) + np.array([2.0, 0, 0, 0])
    router = on_logits(make("bias_balanced", top_k=1, bias_update_rate=0.01))

    def largest():
        return np.bincount(array(router(x).expert_indices)[:, 0], minlength=4).max()

    assert largest() > 180
    for _ in range(100):
        router(x, training=True)
        optimizer_step(router)
    assert largest() < 80
    variables = [v.name for v in router.trainable_variables]
    assert variables == ["kernel"]


def test_a_bias_in_half_precision_is_float32():
    router = on_logits(make("bias_balanced", dtype="bfloat16"))
    assert router.expert_bias.dtype == "float32"


PAIRS = np.log([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])


def test_expert_choice_by_hand():
    # c = ceil(1 * 1 * 4 / 2) = 2: expert 0 takes tokens 0 and 2, expert 1 3 and 1.
    router = on_logits(make("expert_choice", 2, top_k=1))
    found = arrays(router(PAIRS))
    assert found["token_indices"].tolist() == [[0, 2], [3, 1]]
    np.testing.assert_allclose(found["combine_weights"], [[0.9, 0.7], [0.8, 0.4]], 1e-6)
    assert not found["invalid"].any()


def test_expert_choice_passes_over_padding_and_nan_by_hand():
    # c = ceil(1.5 * 1 * 4 / 2) = 3, but only tokens 0 and 1 can be chosen.
    router = on_logits(make("expert_choice", 2, top_k=1, capacity_factor=1.5))
    x = PAIRS.copy()
    x[3] = np.inf
    found = arrays(router(x, mask=np.array([True, True, False, True])))
    assert found["token_indices"].tolist() == [[0, 1, 4], [1, 0, 4]]
    np.testing.assert_allclose(
        found["combine_weights"], [[0.9, 0.6, 0], [0.4, 0.1, 0]], 1e-6
    )
    assert found["invalid"].tolist() == [False, False, False, True]
    # What is padding is not invalid, whatever it holds.
    found = arrays(router(x, mask=np.array([True, True, True, False])))
    assert not found["invalid"].any()


def test_sinkhorn_by_hand():
    """Both tokens want expert 0, the second one more so. One of them must go."""
    router = on_logits(make("sinkhorn", 2, top_k=1))
    x = np.array([[2.0, 1.0], [3.0, 0.0]])
    assert array(router(x).expert_indices).tolist() == [[0], [0]]
    found = arrays(router(x, training=True))
    assert found["expert_indices"].tolist() == [[1], [0]]
    # The weights are those of a plain softmax: 1 / (1 + e) and 1 / (1 + e^-3).
    np.testing.assert_allclose(
        found["combine_weights"], [[1 / (1 + np.e)], [1 / (1 + np.exp(-3))]], 1e-5
    )


def test_sinkhorn_balances_a_skewed_batch():
    x = tokens(512, 4) + np.array([3.0, 0, 0, -2.0])
    router = on_logits(make("sinkhorn", top_k=1, temperature=0.3))
    plain = np.bincount(array(router(x).expert_indices)[:, 0], minlength=4)
    balanced = array(router(x, training=True).expert_indices)[:, 0]
    assert plain.max() > 400
    assert np.bincount(balanced, minlength=4).max() < 1.15 * 512 / 4


def test_padding_and_nan_take_no_part_in_the_balance():
    x = np.array([[2.0, 1.0], [3.0, 0.0], [9.0, 0.0], [np.nan, 1.0]])
    router = on_logits(make("sinkhorn", 2, top_k=1))
    mask = np.array([True, True, False, True])
    found = array(router(x, mask=mask, training=True).expert_indices)
    assert found[:2].tolist() == [[1], [0]]
    nobody = router(x, mask=np.zeros(4, bool), training=True)
    assert set(array(nobody.expert_indices).ravel()) <= {0, 1}


# Hashes


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_vocabulary_is_dealt_evenly(k):
    router = routers.HashRouter(4, k, vocabulary_size=103, seed=2)
    chosen = array(router(np.arange(103)).expert_indices)
    for choice in chosen.T:
        counts = np.bincount(choice, minlength=4)
        assert set(counts) <= {103 // 4, 103 // 4 + 1}
    assert all(len(set(row)) == k for row in chosen)
    again = routers.HashRouter(4, k, vocabulary_size=103, seed=2)
    assert (array(again(np.arange(103)).expert_indices) == chosen).all()
    other = routers.HashRouter(4, k, vocabulary_size=103, seed=3)
    assert (array(other(np.arange(103)).expert_indices) != chosen).any()


def test_ids_outside_the_vocabulary_go_where_their_remainder_goes():
    router = routers.HashRouter(4, 2, vocabulary_size=10)
    inside = array(router(np.array([3, 9, 0])).expert_indices)
    outside = array(router(np.array([13, -1, 10])).expert_indices)
    assert (inside == outside).all()
    large = routers.HashRouter(4, 1, vocabulary_size=1000)
    found = large(np.array([200], "uint8")).expert_indices
    assert array(found) == array(large(np.array([200])).expert_indices)


def test_a_hash_is_the_same_everywhere():
    """Numbers written down once: no backend, process or version may change them."""
    router = routers.HashRouter(7, 3, seed=1)
    ids = np.array([0, 1, 2, 3, 1_000_000, 2**31 - 1, -1, -(2**31)])
    first = [[0, 2, 5], [3, 4, 1], [4, 3, 6], [4, 3, 2]]
    far = [[0, 6, 1], [0, 1, 2], [0, 5, 3], [5, 2, 4]]
    assert array(router(ids).expert_indices).tolist() == first + far


@pytest.mark.parametrize("step", [1, 64, 65536])
def test_a_hash_is_even_and_its_choices_differ(step):
    ids = np.arange(-8000, 8000) * step
    chosen = array(routers.HashRouter(8, 2)(ids.astype("int32")).expert_indices)
    assert (chosen[:, 0] != chosen[:, 1]).all()
    # 7 degrees of freedom: chi² is above 30 once in 10,000 hashes.
    for choice in chosen.T:
        counts = np.bincount(choice, minlength=8)
        assert ((counts - 2000) ** 2 / 2000).sum() < 30
    # All 56 ordered pairs, 286 times each on average.
    pairs = np.bincount(chosen[:, 0] * 8 + chosen[:, 1], minlength=64)
    assert pairs[pairs > 0].size == 56
    assert pairs[pairs > 0].min() > 200


def test_hash_weights_and_shapes():
    router = routers.HashRouter(4, 2)
    flat, column = router(np.arange(5)), router(np.arange(5)[:, None], mask=MASK[:5])
    assert (array(flat.expert_indices) == array(column.expert_indices)).all()
    assert (array(flat.combine_weights) == 0.5).all()
    assert (array(column.mask) == MASK[:5]).all()
    assert flat.router_logits is flat.router_probs is flat.choice_probs is None
    everything = array(routers.HashRouter(3, 3)(np.arange(9)).expert_indices)
    assert (np.sort(everything, axis=1) == [0, 1, 2]).all()


def test_a_hash_wants_ids():
    with pytest.raises(ValueError, match=r"`router_inputs`.*float32"):
        routers.HashRouter(4)(np.ones(3, "float32"))
    with pytest.raises(ValueError, match=r"\(n,\) or \(n, 1\).*\(3, 2\)"):
        routers.HashRouter(4)(np.ones((3, 2), "int32"))


# Two levels


HIERARCHIES = [
    {"top_k_groups": 2, "top_k_experts": 2},
    {"top_k_groups": 1, "top_k_experts": 2},
    {"top_k_groups": 2, "top_k_experts": 1, "use_bias": True},
    {"top_k_groups": 1, "top_k_experts": 1},
    {"top_k_groups": 3, "top_k_experts": 4, "use_bias": True},
]


def with_random_weights(router, d=5):
    rng = np.random.default_rng(1)
    router.build((None, d))
    values = [rng.normal(size=w.shape) for w in router.trainable_variables]
    for variable, value in zip(router.trainable_variables, values, strict=True):
        variable.assign(value)
    return values


@pytest.mark.parametrize("options", HIERARCHIES)
def test_a_hierarchy_and_its_gradients_equal_the_oracle(options):
    x = tokens().astype("float64")
    router = routers.HierarchicalRouter(3, 4, dtype="float64", **options)
    weights = with_random_weights(router)
    kept = (router.top_k_groups, router.top_k_experts)
    assert router.num_experts == 12
    assert router.top_k == kept[0] * kept[1]

    def oracle():
        biases = weights[2:] or [None, None]
        return routing_oracles.hierarchical(x, *weights[:2], *biases, *kept)

    expected, found = oracle(), arrays(router(x))
    assert set(found) == set(expected)
    for field, values in expected.items():
        np.testing.assert_allclose(
            found[field], values, **backends.tolerance(1e-6, 1e-9), err_msg=field
        )
    fields = ["combine_weights", "router_logits", "router_probs"]
    rng = np.random.default_rng(2)
    cotangents = [rng.normal(size=expected[field].shape) for field in fields]
    layer = Fields(router, floats=True)
    layer.build(x.shape)
    by_weight, by_input = backends.gradients(layer, [x], cotangents)

    def scalar():
        record = oracle()
        terms = zip(fields, cotangents, strict=True)
        return sum((record[field] * c).sum() for field, c in terms)

    numeric = oracles.numeric_gradients(scalar, [x, *weights])
    for gradient, values in zip([*by_input, *by_weight], numeric, strict=True):
        np.testing.assert_allclose(gradient, values, **backends.tolerance(1e-4, 1e-7))


def test_a_hierarchy_that_keeps_all_is_the_dense_mixture_of_two_levels():
    """Jordan and Jacobs 1994: the weight of expert (i, j) is g_i g_j|i."""
    router = routers.HierarchicalRouter(3, 4, 3, 4, dtype="float64")
    with_random_weights(router)
    choices = router(tokens().astype("float64"))
    record, gates = arrays(choices), routing.gates(choices, 12, 7)
    np.testing.assert_allclose(
        array(gates), record["router_probs"], **backends.tolerance(1e-9)
    )
    np.testing.assert_allclose(record["router_probs"].sum(axis=1), 1, rtol=1e-6)
    logits = record["router_logits"]
    np.testing.assert_allclose(
        routing_oracles.softmax(logits), record["router_probs"], rtol=1e-6
    )


def test_a_hierarchy_by_hand():
    # Primary gates 1/2, 1/6 and 1/3; secondary ones 1/4, 3/4 and 3/5, 2/5 and 0.9, 0.1
    x = np.ones((1, 1))

    def of(top_k_groups, top_k_experts):
        router = routers.HierarchicalRouter(3, 2, top_k_groups, top_k_experts)
        router.build((None, 1))
        router.kernel.assign(np.log([[3.0, 1.0, 2.0]]))
        router.expert_kernel.assign(np.log([[[1.0, 3.0]], [[3.0, 2.0]], [[9.0, 1.0]]]))
        record = arrays(router(x))
        probs = [[1 / 8, 3 / 8, 1 / 10, 1 / 15, 3 / 10, 1 / 30]]
        np.testing.assert_allclose(record["router_probs"], probs, rtol=1e-5)
        weights = record["combine_weights"][0].tolist()
        return record["expert_indices"][0].tolist(), pytest.approx(weights, rel=1e-5)

    # One of each level: their probabilities.
    assert of(1, 1) == ([1], [3 / 8])
    # Groups 0 and 2 share 3/5 and 2/5; in each the best expert.
    assert of(2, 1) == ([1, 4], [0.6 * 0.75, 0.4 * 0.9])
    # All experts of both. 0.6 (1/4, 3/4) and 0.4 (0.9, 0.1), the largest first.
    assert of(2, 2) == ([1, 4, 0, 5], [0.45, 0.36, 0.15, 0.04])
    assert of(1, 2) == ([1, 0], [3 / 8, 1 / 8])


@pytest.mark.parametrize("options", HIERARCHIES)
def test_choices_of_a_hierarchy_are_different_experts_of_few_groups(options):
    x = tokens(20)
    x[3], x[5, 1] = np.nan, np.inf
    router = routers.HierarchicalRouter(3, 4, **options)
    with_random_weights(router)
    chosen = arrays(router(x))["expert_indices"]
    assert chosen.shape == (20, router.top_k)
    assert chosen.dtype == np.int32
    assert ((chosen >= 0) & (chosen < 12)).all()
    for row in chosen:
        groups, counts = np.unique(row // 4, return_counts=True)
        assert len(set(row)) == router.top_k
        assert len(groups) == options["top_k_groups"]
        assert (counts == options["top_k_experts"]).all()


def test_a_hierarchy_of_one_group_or_of_single_experts_is_a_flat_router():
    x = tokens()
    flat = make("top_k", 4)
    flat.build(x.shape)
    expected = arrays(flat(x))
    one_group = routers.HierarchicalRouter(1, 4, 1, 2)
    one_group.build(x.shape)
    one_group.expert_kernel.assign(array(flat.kernel)[None])
    single = routers.HierarchicalRouter(4, 1, 2, 1)
    single.build(x.shape)
    single.kernel.assign(flat.kernel)
    for router in (one_group, single):
        found = arrays(router(x))
        for field in ("expert_indices", "combine_weights", "router_probs"):
            np.testing.assert_allclose(found[field], expected[field], rtol=1e-5)


def test_kernels_of_a_hierarchy_differ():
    router = routers.HierarchicalRouter(4, 4, kernel_initializer=glorot(seed=1))
    router.build((None, 8))
    kernel, kernels = array(router.kernel), array(router.expert_kernel)
    assert (kernels[0] != kernels[1]).all()
    assert (kernels[0] != kernel).all()
    # Every secondary gate is drawn with its own fans: sqrt(6 / (8 + 4)) is the bound.
    assert 0.6 < np.abs(kernels).max() <= np.sqrt(6 / 12)


def glorot(seed):
    return keras.initializers.GlorotUniform(seed=seed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "`num_groups`.*0"),
        ((4, 0), "`experts_per_group`.*0"),
        ((2, 4, 3), "`top_k_groups` must not exceed `num_groups`.*=3, num_groups=2"),
        ((4, 2, 2, 3), "`top_k_experts` must not exceed `experts_per_group`.*=3"),
        ((4, 2, 0), "`top_k_groups`.*0"),
    ],
)
def test_bad_arguments_of_a_hierarchy_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        routers.HierarchicalRouter(*arguments)


# What all promise

EVERY = [
    *[(name, {}) for name in ALL],
    ("hash", {"vocabulary_size": 50}),
    ("bias_balanced", {"num_groups": 2, "top_k_groups": 1}),
    ("hierarchical", {"top_k_groups": 1, "top_k_experts": 2, "use_bias": True}),
    ("top_k", {"score_function": "sigmoid", "use_bias": True, "jitter": 0.2}),
]


def feed(name, n=7):
    return np.arange(n).astype("int32")[:, None] if name == "hash" else tokens(n)


def model_of(router, x):
    inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)
    return keras.Model(inputs, Fields(router)(inputs))


def takes_unknown_n(name):
    return name != "expert_choice" or keras.backend.backend() == "tensorflow"


def assert_equal(found, expected, **tolerance):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(array(a), array(b), **tolerance)


def test_the_table_of_routers_is_coherent():
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


def test_expert_choice_computes_its_capacity_in_the_graph():
    """An exported model does not know n; the slots are those of `expert_capacity`."""
    if keras.backend.backend() == "jax":
        with pytest.raises(ValueError, match="number of tokens to be known"):
            model_of(make("expert_choice"), tokens())
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow has shapes that the run decides")
    import tensorflow as tf

    router = make("expert_choice", 5, top_k=2, capacity_factor=1.1)
    layer = Fields(router)
    layer(tokens())
    signature = [tf.TensorSpec([None, 5], "float32")]
    for jit in (False, True):
        call = tf.function(lambda x: layer(x), signature, jit_compile=jit)
        for n in (0, 1, 3, 7, 10):
            found, expected = call(tokens(n)), layer(tokens(n))
            slots = routing.expert_capacity(n, 5, 2, 1.1)
            assert found[0].shape == (5, slots)
            assert_equal(found, expected, rtol=1e-5, atol=1e-6)


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


def test_the_bias_is_updated_in_compiled_training():
    """`fit` with a compiler and without moves the bias and trains the kernel."""
    compilers = (False,) if keras.backend.backend() == "torch" else (False, True)
    for jit in compilers:
        layer = WeightsOnly(make("bias_balanced", bias_update_rate=0.125))
        model = keras.Sequential([keras.Input((5,)), layer])
        model.compile("sgd", "mse", jit_compile=jit)
        kernel = array(layer.router.kernel)
        x = tokens(64)
        x[:, 0] += 5
        model.fit(x, np.zeros((64, 2), "float32"), batch_size=32, verbose=0)
        assert set(np.abs(array(layer.router.expert_bias))) <= {0.0, 0.125, 0.25}
        assert array(layer.router.expert_bias).any()
        assert (array(layer.router.kernel) != kernel).any()


class WeightsOnly(keras.layers.Layer):
    def __init__(self, router):
        super().__init__()
        self.router = router

    def build(self, input_shape):
        self.router.build(input_shape)

    def call(self, x, training=None):
        record = self.router(x, training=training)
        self.add_loss(
            losses.load_balancing_loss(record.router_probs, record.expert_indices)
        )
        return record.combine_weights


def test_kernels_of_one_seeded_initializer_differ():
    initializer = keras.initializers.GlorotUniform(seed=1)
    router = make(
        "noisy_top_k",
        kernel_initializer=initializer,
        noise_kernel_initializer=initializer,
    )
    router.build((None, 5))
    assert (array(router.kernel) != array(router.noise_kernel)).all()
    assert (array(on_logits(make("noisy_top_k")).noise_kernel) == 0).all()


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
def test_a_router_stands_in_a_functional_model(name):
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
def test_a_mask_that_comes_later_moves_no_field(name, field):
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


# Routers by name, class, config and object


@pytest.mark.parametrize("name", routers.KNOWN)
def test_get_makes_a_router_by_its_name(name):
    defaults = {"num_experts": 4, "top_k": 2, "seed": 3, "capacity_factor": 1.5}
    router = routers.get(name, **defaults, name="given", dtype="float64")
    assert type(router) is routers.KNOWN[name]
    assert router.num_experts == 4
    assert router.top_k == (4 if name == "dense" else 2)
    assert (router.name, router.dtype_policy.name) == ("given", "float64")
    for argument in ("seed", "capacity_factor"):
        assert getattr(router, argument, None) in (None, defaults[argument])


def test_get_takes_a_class_a_config_and_an_object():
    router = routers.get(routers.HierarchicalRouter, num_groups=2, experts_per_group=3)
    assert router.num_experts == 6
    assert routers.get(router, num_experts=9) is router
    again = routers.get(keras.saving.serialize_keras_object(router))
    assert type(again) is type(router)
    assert again.get_config() == router.get_config()


@pytest.mark.parametrize(
    "value",
    [None, "top-k", 3, keras.layers.Dense, keras.layers.Dense(4), lambda x: x],
    ids=["None", "misspelt", "number", "class", "layer", "function"],
)
def test_get_refuses_what_is_no_router(value):
    message = r"`identifier` must be one of.*'top_k'.*Received: identifier="
    with pytest.raises(ValueError, match=message):
        routers.get(value, num_experts=4)


def test_get_leaves_out_only_what_another_router_has():
    with pytest.raises((TypeError, ValueError), match="topk"):
        routers.get("top_k", num_experts=4, topk=2)
    with pytest.raises(ValueError, match="`top_k` must not exceed"):
        routers.get("top_k", num_experts=4, top_k=5)


@pytest.mark.parametrize("name", ALL)
def test_the_attributes_of_a_router_describe_its_record(name):
    router = make(name)
    record = arrays(router(feed(name)))
    assert router.has_probs == ({"router_logits", "router_probs"} <= set(record))
    assert router.reads_ids == ("int" in str(feed(name).dtype))
