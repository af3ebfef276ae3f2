"""Layers, losses and metrics of keras-rs around ours: used as they are."""

import keras
import numpy as np
import pytest
from keras import ops
from sklearn.metrics import ndcg_score

from keras_moe.experts import LayerExperts
from keras_moe.layers import PLE, DSelectK, MMoE, MoE, SoftMoE, Tower
from keras_moe.multitask import MultiTaskModel, UncertaintyWeighting

keras_rs = pytest.importorskip("keras_rs")

TASKS = ["click", "like"]


def values(outputs):
    return {task: ops.convert_to_numpy(output) for task, output in outputs.items()}


def test_crosses_and_dots_in_front_and_experts_behind_them(tmp_path):
    """A ranker of DCN-V2 (crosses) and DLRM (dots), with mixtures for its top."""
    ids = {name: keras.Input((), name=name, dtype="int32") for name in ("user", "item")}
    rows = keras.Input((3,), name="row")
    vectors = [keras.layers.Embedding(20, 4)(column) for column in ids.values()]
    vectors.append(keras.layers.Dense(4, "relu")(rows))
    dots = keras_rs.layers.DotInteraction()(vectors)
    flat = keras.layers.Concatenate()(vectors)
    crossed = keras_rs.layers.FeatureCross(projection_dim=3)(flat)
    crossed = keras_rs.layers.FeatureCross()(flat, crossed)
    joined = keras.layers.Concatenate()([crossed, dots])
    sparse = MoE(4, (8, 6), num_shared_experts=1)(joined)
    shared = MMoE(4, (6,), TASKS)(sparse, joined)
    outputs = {task: Tower((4,), "sigmoid", name=task)(shared[task]) for task in TASKS}
    model = MultiTaskModel([*ids.values(), rows], outputs)
    model.compile("adam", dict.fromkeys(TASKS, "binary_crossentropy"))
    rng = np.random.default_rng(0)
    x = [*rng.integers(0, 20, (2, 64)), rng.normal(size=(64, 3)).astype("float32")]
    y = {task: (x[0] % (i + 2) == 0).astype("float32") for i, task in enumerate(TASKS)}
    before = model.get_weights()
    losses = model.fit(x, y, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    still = [
        weight.path
        for weight, value in zip(model.weights, before, strict=True)
        if np.array_equal(ops.convert_to_numpy(weight), value)
    ]
    assert still == []
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for task, expected in values(model(x)).items():
        np.testing.assert_array_equal(values(again(x))[task], expected)


def test_tables_of_a_distributed_embedding_feed_a_mixture(tmp_path):
    """On a CPU, the optimizer of `compile` updates the tables, not their own."""
    embedding = keras_rs.layers.DistributedEmbedding
    table, feature = keras_rs.layers.TableConfig, keras_rs.layers.FeatureConfig
    rows = 16  # Of every batch: the layer needs to know it.
    own = keras.optimizers.SGD(7.0)
    users = table("users", 50, 4, optimizer=own)
    items = table("items", 30, 4, combiner="sum", optimizer=own)
    tables = embedding(
        {
            "user": feature("user", users, (rows,), (rows, 4)),
            "seen": feature("seen", items, (rows, 3), (rows, 4)),
        }
    )
    inputs = {
        "user": keras.Input((), rows, dtype="int32", name="user"),
        "seen": keras.Input((3,), rows, dtype="int32", name="seen"),
    }
    vectors = tables(inputs)
    joined = keras.layers.Concatenate()([vectors["user"], vectors["seen"]])
    shared = MMoE(3, (8, 5), TASKS)(joined)
    outputs = {task: Tower((), "sigmoid", name=task)(shared[task]) for task in TASKS}
    model = MultiTaskModel(inputs, outputs)
    model.compile(
        keras.optimizers.SGD(1.0), dict.fromkeys(TASKS, "binary_crossentropy")
    )
    rng = np.random.default_rng(0)
    x = {
        "user": rng.integers(0, 25, 4 * rows).astype("int32"),
        "seen": rng.integers(0, 30, (4 * rows, 3)).astype("int32"),
    }
    y = {"click": x["user"] % 2, "like": x["seen"][:, 0] % 2}

    def values_of_tables():
        found = tables.get_embedding_tables()
        return {name: ops.convert_to_numpy(value) for name, value in found.items()}

    before = values_of_tables()
    seen = before["items"][x["seen"][:rows]].sum(axis=1)  # The combiner.
    first = {name: value[:rows] for name, value in x.items()}
    np.testing.assert_allclose(values(tables(first))["seen"], seen, rtol=1e-5)

    losses = model.fit(x, y, batch_size=rows, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.95 * losses[0]
    for name, column in (("users", "user"), ("items", "seen")):
        changed = (values_of_tables()[name] != before[name]).any(axis=1)
        np.testing.assert_array_equal(np.flatnonzero(changed), np.unique(x[column]))
        assert np.abs(values_of_tables()[name] - before[name]).max() < 3.0

    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    expected = model.predict(x, batch_size=rows, verbose=0)
    for task, found in again.predict(x, batch_size=rows, verbose=0).items():
        np.testing.assert_array_equal(found, expected[task])


def crosses_and_mlps(count):
    cross = keras_rs.layers.FeatureCross(projection_dim=3)
    mlp = keras.Sequential([keras.layers.Dense(8, "relu"), keras.layers.Dense(6)])
    others = [keras_rs.layers.FeatureCross() for _ in range(count - 2)]
    return LayerExperts([mlp, cross, *others])


MIXTURES = {
    "MoE": lambda: MoE(3, experts=crosses_and_mlps(3)),
    "SoftMoE": lambda: SoftMoE(3, experts=crosses_and_mlps(3)),
    "DSelectK": lambda: DSelectK(3, None, TASKS, 2, experts=crosses_and_mlps(3)),
    "PLE": lambda: PLE(1, 1, 1, None, TASKS, experts=crosses_and_mlps(3)),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_crosses_and_an_mlp_weighs_what_they_give(name, tmp_path):
    inputs = keras.Input((4, 6))
    mixture = MIXTURES[name]()
    model = keras.Model(inputs, mixture(inputs))
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype("float32")
    found = keras.tree.flatten(model(x))
    for output in found:
        assert output.shape == (2, 4, 6)
        assert np.isfinite(ops.convert_to_numpy(output)).all()
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for output, loaded in zip(found, keras.tree.flatten(again(x)), strict=True):
        np.testing.assert_array_equal(*map(ops.convert_to_numpy, (output, loaded)))


def reciprocal_rank(labels, scores):
    """Of the first relevant item of each list; a label of -1 is no item."""
    scores = np.where(labels < 0, -np.inf, scores)
    order = np.argsort(-scores, axis=1)
    relevant = np.take_along_axis(labels, order, 1) >= 1
    return float(np.mean(relevant.any(1) / (1 + relevant.argmax(1))))


@pytest.mark.parametrize(
    "weighting", [None, UncertaintyWeighting], ids=["sum", "learned"]
)
def test_ranking_losses_and_metrics_of_each_task(weighting, tmp_path):
    lists = keras.Input((5, 6))  # Five items for each query.
    # Smooth, so that no two items of a list have one score.
    shared = MMoE(4, (8, 6), TASKS, activation="tanh")(lists)
    scores = {}
    for task in TASKS:
        score = Tower((4,), hidden_activation="tanh")(shared[task])
        scores[task] = keras.layers.Reshape((5,), name=task)(score)
    model = MultiTaskModel(
        lists, scores, loss_weighting=weighting() if weighting else None
    )
    losses = {
        "click": keras_rs.losses.PairwiseLogisticLoss(temperature=0.5),
        "like": keras_rs.losses.ListMLELoss(),
    }
    metrics = {
        "click": [keras_rs.metrics.MeanReciprocalRank(name="mrr")],
        "like": [keras_rs.metrics.NDCG(k=3, name="ndcg", shuffle_ties=False)],
    }
    model.compile(keras.optimizers.Adam(0.02), losses, metrics=metrics)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 5, 6)).astype("float32")
    x[:, 0, :2] = np.abs(x[:, 0, :2])  # Something relevant in every list.
    grades = np.clip(np.round(x[:, :, 1] + 1), 0, 3).astype("float32")
    clicks = (x[:, :, 0] > 0).astype("float32")
    clicks[::4, 4] = -1.0  # Lists of four.
    y = {"click": clicks, "like": grades}
    before = model.evaluate(x, y, verbose=0, return_dict=True)
    model.fit(x, y, epochs=15, verbose=0)
    after = model.evaluate(x, y, verbose=0, return_dict=True)
    assert after["click_mrr"] > before["click_mrr"]
    assert after["like_ndcg"] > before["like_ndcg"]
    found = values(model(x))
    assert after["click_mrr"] == pytest.approx(
        reciprocal_rank(clicks, found["click"]), rel=1e-5
    )
    # Keras-rs rewards a grade g by 2^g - 1, scikit-learn by what it is given.
    expected = ndcg_score(2.0**grades - 1, found["like"], k=3, ignore_ties=True)
    assert after["like_ndcg"] == pytest.approx(expected, rel=1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.evaluate(x, y, verbose=0, return_dict=True) == pytest.approx(after)


def test_retrieval_over_the_vectors_of_a_task():
    inputs = keras.Input((6,))
    shared = MMoE(4, (8, 5), TASKS)(inputs)
    query = keras.Model(inputs, shared["like"])
    rng = np.random.default_rng(0)
    items = rng.normal(size=(30, 5)).astype("float32")
    ids = rng.permutation(1000)[:30].astype("int32")
    retrieval = keras_rs.layers.BruteForceRetrieval(items, ids, k=4)
    model = keras.Model(inputs, retrieval(query.output))
    x = rng.normal(size=(7, 6)).astype("float32")
    scores, best = model.predict(x, verbose=0)
    expected = ops.convert_to_numpy(query(x)) @ items.T
    order = np.argsort(-expected, axis=1)[:, :4]
    np.testing.assert_array_equal(best, ids[order])
    np.testing.assert_allclose(
        scores, np.take_along_axis(expected, order, 1), rtol=1e-4, atol=1e-5
    )


def test_retrieval_losses_in_a_batch_train_a_task():
    """Two towers with sampled softmax: hits removed, popular items corrected."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 6)).astype("float32")
    item = rng.integers(0, 8, 32).astype("int32")
    share = (np.bincount(item, minlength=8)[item] / 32).astype("float32")

    @keras.saving.register_keras_serializable("tests")
    class TwoTowers(keras.Model):
        def __init__(self):
            super().__init__()
            self.shared = MMoE(4, (8, 5), TASKS)
            self.items = keras.layers.Embedding(8, 5)
            self.remove = keras_rs.layers.RemoveAccidentalHits()
            self.correct = keras_rs.layers.SamplingProbabilityCorrection()

        def call(self, inputs):
            query = self.shared(inputs["row"])["like"]
            logits = ops.matmul(query, ops.transpose(self.items(inputs["item"])))
            logits = self.correct(logits, inputs["share"])
            return self.remove(logits, ops.eye(32), inputs["item"])

    model = TwoTowers()
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss)
    inputs = {"row": x, "item": item, "share": share}
    losses = model.fit(
        inputs, np.eye(32, dtype="float32"), batch_size=32, epochs=15, verbose=0
    ).history["loss"]
    assert losses[-1] < 0.95 * losses[0]
