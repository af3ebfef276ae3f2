"""Task: labels of the steps of a sequence, and of the candidates of a list."""

import keras
import numpy as np
import pytest

from keras_moe.multitask import MultiTaskModel, Task
from tests.support import task_oracles
from tests.support.declared import EAGER, assert_same_bits, set_weights, weights_of


def _sequence_model(metrics=("mae",), **kwargs):
    inputs = keras.Input((5,), dtype="int32", name="ids")
    embedded = keras.layers.Embedding(7, 3, mask_zero=True)(inputs)
    task = Task("time", "regression", metrics=metrics, **kwargs)
    model = MultiTaskModel(inputs, {"time": task.tower(())(embedded)}, tasks=[task])
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=EAGER)
    return model


IDS = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [6, 1, 2, 3, 4]], "int32")


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1)])
@pytest.mark.parametrize("by", ["mask", "label", "label and row weights"])
def test_steps_of_a_sequence(by, shape):
    """Masked and undefined steps change no bit, and the mean is over the others."""
    kwargs = {} if by == "mask" else {"defined": "seen"}
    model, found = _sequence_model(**kwargs), []
    start = weights_of(model)
    defined = IDS > 0
    seen = np.array([[1, 0, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 0, 0]], "float32")
    if by != "mask":
        defined = defined & (seen > 0)
    weights = np.array([1.0, 0.5, 2.0]) if "row" in by else None
    used = defined * (1.0 if weights is None else weights[:, None])
    labels = np.random.default_rng(0).normal(size=(3, 5))
    outputs = model.predict(IDS, verbose=0)["time"]
    for filler in (0.0, 1e9, np.nan):
        set_weights(model, start)
        y = {"time": np.where(defined, labels, filler).reshape(shape)}
        if by != "mask":
            y["seen"] = seen.reshape(shape)
        first = model.evaluate(
            IDS, y, sample_weight=weights, verbose=0, return_dict=True
        )
        history = model.fit(
            IDS, y, sample_weight=weights, verbose=0, epochs=2, shuffle=False
        ).history
        found.append((first, history, weights_of(model)))
    wanted = task_oracles.mean(
        task_oracles.squared_error,
        labels.ravel(),
        outputs.reshape(-1, 1),
        used.ravel(),
    )
    np.testing.assert_allclose(found[0][0]["time_loss"], wanted, rtol=1e-5)
    errors = np.abs(labels - outputs[..., 0])
    np.testing.assert_allclose(
        found[0][0]["mae"], (errors * used).sum() / used.sum(), rtol=1e-5
    )
    for first, history, arrays in found[1:]:
        assert first == found[0][0]
        assert history == found[0][1]
        assert_same_bits(arrays, found[0][2])


@pytest.mark.parametrize("masked", [False, True])
def test_lists_of_candidates(masked):
    """Undefined and masked candidates are not in the list; a list may be empty."""
    pytest.importorskip("keras_rs")
    inputs = keras.Input((4, 4), name="x")
    features_of = keras.layers.Masking()(inputs) if masked else inputs
    task = Task("score", "ranking", defined="shown")
    model = MultiTaskModel(inputs, {"score": task.tower(())(features_of)}, tasks=[task])
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=EAGER)
    rng, start, found = np.random.default_rng(0), weights_of(model), []
    x = rng.normal(size=(3, 4, 4)).astype("float32")
    shown = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], "float32")
    if masked:
        x[shown == 0] = 0.0
    relevance = rng.integers(0, 3, (3, 4)).astype("float32")
    relevance[0], relevance[2] = [2, 0, 1, 1], [0, 1, 2, 0]
    scores = model.predict(x, verbose=0)["score"][..., 0]
    for filler in (0.0, 1e9, np.nan):
        set_weights(model, start)
        y = {"score": np.where(shown > 0, relevance, filler), "shown": shown}
        if masked:
            y["shown"] = np.ones((3, 4))
            y["score"] = np.where(shown > 0, relevance, filler)
        first = model.evaluate(x, y, verbose=0, return_dict=True)
        history = model.fit(x, y, verbose=0, epochs=2, shuffle=False).history
        found.append((first, history, weights_of(model)))
    known = np.where(shown > 0, relevance, -1)
    each = [
        task_oracles.pairwise(lambda d: task_oracles.softplus(-d), y, s)
        for y, s in zip(known, scores, strict=True)
    ]
    np.testing.assert_allclose(
        found[0][0]["score_loss"], (each[0] + each[2]) / 2, rtol=1e-5
    )
    for first, history, arrays in found[1:]:
        assert first == found[0][0]
        assert history == found[0][1]
        assert_same_bits(arrays, found[0][2])
