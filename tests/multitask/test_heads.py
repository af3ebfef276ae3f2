"""Heads: losses, gradients and predictions against plain Python, row by row."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.multitask import Task, heads
from tests.support import backends, task_oracles
from tests.support.checks import array


class _Loss(keras.layers.Layer):
    """The loss of fixed labels and weights as a layer of the outputs."""

    def __init__(self, loss, labels, weights=None, **kwargs):
        super().__init__(**kwargs)
        self.loss, self.labels, self.weights_of_rows = loss, labels, weights
        self.built = True

    def call(self, outputs):
        return self.loss(self.labels, outputs, self.weights_of_rows)


def _loss_and_gradient(loss, labels, outputs, weights=None):
    layer = _Loss(loss, labels, weights, dtype=outputs.dtype.name)
    found, _, (gradient,) = backends.outputs_and_gradients(layer, [outputs], [1.0])
    return found[0], gradient


def _in_float64(head):
    """The loss of a head in float64."""
    loss = head.loss()
    return type(loss)(**{**loss.get_config(), "dtype": "float64"})


RNG = np.random.default_rng(0)
P = RNG.uniform(0.05, 0.95, (6, 1))
LEVELS = np.sort(RNG.uniform(0.05, 0.95, (6, 4)))[:, ::-1].copy()
CLASSES = RNG.dirichlet(np.ones(3), 6)
AMOUNTS = np.array([0.0, 1e-3, 1.0, 30.0, 0.0, 1e4])
ZILN = np.concatenate([P, RNG.normal(size=(6, 1)) + 2, RNG.uniform(0.5, 2, (6, 1))], -1)
CASES = {
    "binary": (heads.Binary(), task_oracles.binary, [0, 1, 1, 0, 0.3, 1], P),
    "regression": (
        heads.Regression(),
        task_oracles.squared_error,
        RNG.normal(size=6) * 3,
        RNG.normal(size=(6, 1)),
    ),
    "ordinal": (heads.Ordinal(5), task_oracles.ordinal, [0, 4, 1, 3, 2, 4], LEVELS),
    "multi_class": (
        heads.MultiClass(3),
        task_oracles.multi_class,
        [0, 2, 1, 1, 2, 0],
        CLASSES,
    ),
    "ziln": (heads.ZILN(), task_oracles.ziln, AMOUNTS, ZILN),
}


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.5, 1.0, 0.25, 0.0]])
@pytest.mark.parametrize("flat", [True, False], ids=["(n,)", "(n, 1)"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_oracle(name, flat, weights):
    head, oracle, labels, outputs = CASES[name]
    labels = np.array(labels, "float64")
    weights = None if weights is None else np.array(weights)
    loss, gradient = _loss_and_gradient(
        _in_float64(head), labels if flat else labels[:, None], outputs, weights
    )
    wanted = task_oracles.mean(oracle, labels, outputs, weights)
    np.testing.assert_allclose(loss, wanted, **backends.tolerance(1e-7))
    wanted = task_oracles.gradient(oracle, labels, outputs, weights)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("p", [1e-8, 1e-30, 1.2e-38])
def test_the_log_loss_of_a_rare_event(p):
    """Keras clips at 1e-7. -log p, and -1 / p."""
    p = np.float32(p)
    loss, gradient = _loss_and_gradient(
        heads.LogLoss(), np.ones((1, 1), "float32"), np.full((1, 1), p)
    )
    np.testing.assert_allclose(loss, -math.log(p), rtol=1e-5)
    np.testing.assert_allclose(gradient[0, 0], -1 / float(p), rtol=1e-5)
    # log1p keeps p itself, which 1 - p would lose.
    loss, gradient = _loss_and_gradient(
        heads.LogLoss(), np.zeros((1, 1), "float32"), np.full((1, 1), p)
    )
    if p > 1e-37:  # The smallest numbers may be flushed to 0.
        np.testing.assert_allclose(loss, float(p), rtol=1e-5)
    np.testing.assert_allclose(gradient[0, 0], 1.0, rtol=1e-5)


@pytest.mark.parametrize("label", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_log_loss_of_0_and_1_is_finite(p, label):
    """At most -log 1.18e-38 = 87.3; right labels have a loss of at most 6e-8."""
    loss, gradient = _loss_and_gradient(
        heads.LogLoss(),
        np.full((1, 1), label, "float32"),
        np.full((1, 1), p, "float32"),
    )
    assert np.isfinite(gradient).all()
    if p == label:
        assert 0 <= loss < 1e-7
    else:
        assert 8 < loss < 88


@pytest.mark.parametrize("name", ["ordinal", "ziln"])
def test_probabilities_of_0_and_1_are_finite(name):
    head, *_ = CASES[name]
    labels = np.array([0.0, 4.0, 0.0, 4.0], "float32")
    outputs = np.array([[0.0], [0.0], [1.0], [1.0]], "float32")
    outputs = np.repeat(outputs, head.output_units, axis=-1)
    if name == "ziln":
        outputs[:, 2] = 1.0
    loss, gradient = _loss_and_gradient(head.loss(), labels, outputs)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


def test_ordered_probabilities_fall_with_the_level():
    outputs = np.random.default_rng(1).normal(size=(50, 4)) * 5
    found = array(heads.Ordinal(5).activation(outputs))
    wanted = [task_oracles.ordered_probabilities(row) for row in outputs]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert (np.diff(found, axis=-1) <= 0).all()


def test_ordinal_by_hand():
    """Level 2 of 0..3 at P(y > j) = 0.9, 0.6, 0.2: -log(0.9 * 0.6 * 0.8) = 0.8393.

    The expected level is 0.9 + 0.6 + 0.2 = 1.7.
    """
    head, outputs = heads.Ordinal(4), np.array([[0.9, 0.6, 0.2]], "float32")
    loss = float(head.loss()(np.array([2]), outputs))
    np.testing.assert_allclose(loss, -math.log(0.9 * 0.6 * 0.8), rtol=1e-6)
    np.testing.assert_allclose(array(head.prediction(outputs)), [[1.7]], rtol=1e-6)


def test_two_levels_are_a_binary_task():
    labels, outputs = np.array([0.0, 1.0, 1.0]), P[:3].astype("float32")
    ordinal = float(heads.Ordinal(2).loss()(labels, outputs))
    assert ordinal == float(heads.Binary().loss()(labels, outputs))


def test_ziln_by_hand():
    """At y = e, p = 1/4, mu = 0, sigma = 2: log 4 + log(e * 2 sqrt(2 pi)) + 1/8.

    = 1.38629 + (1 + 0.69315 + 0.91894) + 0.125 = 4.12338; y = 0: -log(3/4) = 0.28768.
    The expected amount is 1/4 exp(0 + 4/2) = 1.84726.
    """
    outputs = np.array([[0.25, 0.0, 2.0]], "float32")
    loss = heads.ZILNLoss()
    np.testing.assert_allclose(float(loss(np.array([math.e]), outputs)), 4.12338, 1e-5)
    np.testing.assert_allclose(float(loss(np.array([0.0]), outputs)), 0.28768, 1e-4)
    found = array(heads.ZILN().prediction(ops.convert_to_tensor(outputs)))
    np.testing.assert_allclose(found, [[1.84726]], rtol=1e-5)


def test_another_unit_shifts_ziln_by_a_constant():
    """At c y and mu + log c the density is 1/c of it: log c for each amount > 0."""
    shifted = ZILN + np.array([0.0, math.log(100), 0.0])
    loss = _in_float64(heads.ZILN())
    before, gradient = _loss_and_gradient(loss, AMOUNTS, ZILN)
    after, again = _loss_and_gradient(loss, 100 * AMOUNTS, shifted)
    tolerance = backends.tolerance(1e-9, 1e-12)
    np.testing.assert_allclose(after - before, math.log(100) * 4 / 6, **tolerance)
    np.testing.assert_allclose(again, gradient, **tolerance)
    head = heads.ZILN()
    found, wanted = (
        array(head.prediction(ops.convert_to_tensor(outputs)))
        for outputs in (shifted, ZILN)
    )
    np.testing.assert_allclose(found, 100 * wanted, rtol=1e-6)


def test_the_activation_of_ziln():
    outputs = ops.convert_to_tensor([[0.0, -3.0, 0.0], [9.0, 2.0, -50.0]])
    found = array(heads.ZILN().activation(outputs))
    wanted = [[0.5, -3.0, math.log(2) + 1e-3], [task_oracles.sigmoid(9), 2.0, 1e-3]]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


PAIRWISE = {
    "pairwise_hinge": lambda d: max(0.0, 1 - d),
    "pairwise_logistic": lambda d: task_oracles.softplus(-d),
    "pairwise_mean_squared_error": None,
    "pairwise_soft_zero_one": lambda d: task_oracles.sigmoid(-d),
}
RANKINGS = [*PAIRWISE, "list_mle"]


@pytest.fixture(scope="module")
def keras_rs():
    return pytest.importorskip("keras_rs")


@pytest.mark.parametrize("name", [n for n, f in PAIRWISE.items() if f])
def test_a_pairwise_loss_is_a_sum_over_pairs(name, keras_rs):
    labels = np.array([[2.0, 0.0, 1.0, -1.0], [0.0, 1.0, -1.0, -1.0]])
    scores = np.random.default_rng(2).normal(size=(2, 4))
    wanted = sum(
        task_oracles.pairwise(PAIRWISE[name], y, s)
        for y, s in zip(labels, scores, strict=True)
    )
    loss = _in_float64(heads.Ranking(name))
    np.testing.assert_allclose(float(loss(labels, scores)), wanted / 2, rtol=1e-5)


@pytest.mark.parametrize("name", RANKINGS)
def test_ranking_is_the_loss_of_the_defined_candidates(name, keras_rs):
    """Lists of 3, 4 and 2 of 5 candidates; the others change no bit."""
    rng = np.random.default_rng(3)
    sizes = [3, 4, 2]
    relevance = [rng.permutation(size).astype("float32") for size in sizes]
    scores = rng.normal(size=(3, 5, 1)).astype("float32")
    weights = np.array([[1.0, 1, 1, 0, 0], [2, 2, 2, 2, 0], [0.5, 0.5, 0, 0, 0]])
    of_list = getattr(keras_rs.losses, heads.ranking._LOSSES[name])
    each = [
        float(np.sum(array(of_list(reduction="none")(y[None], s[None, : len(y), 0]))))
        for y, s in zip(relevance, scores, strict=True)
    ]
    wanted = (1 * each[0] + 2 * each[1] + 0.5 * each[2]) / 3.5
    task, found = Task("rank", heads.Ranking(name)), []
    for filler in (0.0, 5.0, 1e9, np.inf, np.nan):
        labels = np.full((3, 5), filler, "float32")
        for i, y in enumerate(relevance):
            labels[i, : len(y)] = y
        rows = task.rows({"rank": labels}, ops.convert_to_tensor(scores), weights)
        of_lists = task.head.loss_weights(rows.weights)
        assert array(of_lists).tolist() == [1.0, 2.0, 0.5]
        found.append(_loss_and_gradient(task.loss, rows.labels, scores, of_lists))
    np.testing.assert_allclose(found[0][0], wanted, rtol=1e-5)
    assert np.abs(found[0][1][weights > 0]).max() > 0
    assert (found[0][1][weights == 0] == 0).all()
    for loss, gradient in found[1:]:
        np.testing.assert_array_equal(loss, found[0][0])
        np.testing.assert_array_equal(gradient, found[0][1])


@pytest.mark.parametrize("name", ["ordinal", "multi_class", "ziln", "binary"])
def test_a_missing_label_of_a_defined_row_is_not_a_label(name):
    """The loss is NaN: a level or class of 0 would be learned."""
    head, _, labels, outputs = CASES[name]
    labels = np.array(labels, "float32")
    labels[1] = np.nan
    assert np.isnan(float(head.loss()(labels, outputs.astype("float32"))))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        *[(name, label) for name in ("multi_class", "ordinal") for label in (-1, 0.5)],
        ("multi_class", 3),
        ("multi_class", 1e9),
        ("ordinal", 5),
        ("binary", 1.5),
        ("binary", -1),
        ("ziln", -1),
        ("ziln", np.inf),
    ],
)
def test_a_label_that_is_not_valid_gives_nan(name, label):
    """A dataset's labels are not checked: a class 3 of 3 was read as another one."""
    head, _, _, outputs = CASES[name]
    labels, outputs = np.array([0.0, label], "float32"), outputs[:2].astype("float32")
    assert not head.valid(labels)[1]
    assert np.isnan(float(head.loss()(labels, outputs)))


@pytest.mark.parametrize(
    "head",
    [
        heads.Binary(),
        heads.Regression(),
        heads.ZILN(),
        heads.Ordinal(5),
        heads.MultiClass(3),
        heads.Ranking("list_mle"),
    ],
    ids=repr,
)
def test_config_round_trips(head):
    config = keras.saving.serialize_keras_object(head)
    again = heads.get(config)
    assert type(again) is type(head)
    assert again.get_config() == head.get_config()
    assert again.output_units == head.output_units
    assert repr(again) == repr(head)
    if isinstance(head, heads.Ranking):
        pytest.importorskip("keras_rs")
    loss = keras.saving.serialize_keras_object(head.loss())
    assert (
        keras.saving.deserialize_keras_object(loss).get_config()
        == head.loss().get_config()
    )


def test_get():
    for name in ("binary", "regression", "ziln", "ranking"):
        head = heads.get(name)
        assert heads.get(head) is head
        assert type(head).__name__.lower() == name
    for wrong in ("ordinal", None, 3, heads.Binary, {"class_name": "Dense"}):
        with pytest.raises((ValueError, TypeError), match=r"head|class_name|Dense"):
            heads.get(wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: heads.Ordinal(1), "`num_levels`"),
        (lambda: heads.MultiClass(1), "`num_classes`"),
        (lambda: heads.Ranking("ndcg"), "`loss` must be"),
        (lambda: heads.RankingLoss("ndcg"), "`loss` must be"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("head", [heads.Ordinal(3), heads.ZILN(), heads.MultiClass(3)])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_towers_give_float32_outputs(head, policy):
    tower = Task("a", head).tower((4,), dtype=policy)
    outputs = tower(np.ones((2, 3), "float32"))
    assert keras.backend.standardize_dtype(outputs.dtype) == "float32"
    assert outputs.shape == (2, head.output_units)
