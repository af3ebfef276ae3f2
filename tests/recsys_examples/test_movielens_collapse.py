"""A mixture of the ranker that collapses gives a warning, and the training goes on."""

import json
from dataclasses import replace

import numpy as np
import pytest

from recsys_examples.movielens import training


@pytest.fixture
def gates_alike(monkeypatch):
    """Gates that give all experts equal weights, for every task and user."""
    build = training.build_ranker

    def build_with_such_gates(*arguments):
        ranker = build(*arguments)
        for variable in ranker.body.gates.weights:
            variable.assign(np.zeros(variable.shape))
        ranker.body.gates.trainable = False
        return ranker

    monkeypatch.setattr(training, "build_ranker", build_with_such_gates)


def fitted(windows, settings, file):
    data = windows.train, windows.catalogue, replace(settings, max_epochs=3)
    return training.fit_ranker(*data, verbose=0, experts=file)


@pytest.mark.usefixtures("eager_training", "gates_alike")
def test_a_collapse_gives_a_warning_alone(windows, settings, tmp_path):
    file = tmp_path / "experts.jsonl"
    with pytest.warns(UserWarning, match="epoch 2, gates alike: mmoe: ") as caught:
        fit = fitted(windows, settings, file)
    assert len([w for w in caught if issubclass(w.category, UserWarning)]) == 1
    assert len(fit.curves["loss"]) == 3
    (last,) = [json.loads(line) for line in file.read_text().splitlines()][2:]
    assert last["mixtures"]["mmoe"]["gate_distance"] == 0


@pytest.mark.usefixtures("eager_training")
def test_a_healthy_training_gives_none(windows, settings, tmp_path):
    """A warning would be an error in the tests."""
    file = tmp_path / "experts.jsonl"
    fitted(windows, settings, file)
    assert len(file.read_text().splitlines()) == 3
