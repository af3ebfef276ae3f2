"""`--study --body moe`: the sparse mixture against dense layers, of one ranker."""

from dataclasses import replace

import numpy as np
import pytest

from recsys_examples.movielens import body_study, tuned
from recsys_examples.movielens.body_study import (
    Studied,
    bodies_table,
    dense_of_equal_cost,
    multiply_adds,
    num_features,
    run_bodies,
)
from recsys_examples.movielens.model import TASKS, build_ranker
from tests.recsys_examples.test_movielens_command import check_study, write_csv
from tests.support import processes

BODIES = ["sparse MoE", "dense, equal FLOPs", "dense, equal parameters"]


@pytest.fixture(scope="module")
def sparse(settings):
    return replace(settings, body="moe", num_experts=4)


def kernels(windows, settings):
    """The numbers of elements of all kernels that a user's row is multiplied by."""
    popularity = np.zeros(len(windows.catalogue))
    users = windows.train.user_ids
    ranker = build_ranker(windows.catalogue, users, popularity, settings)
    names = [f"{kind}_{task}" for kind in ("user", "level") for task in TASKS]
    heads = sum(
        int(np.prod(weight.shape))
        for weight in ranker.training.trainable_variables
        if weight.path.split("/")[0] in names and "bias" not in weight.path
    )
    body = {
        weight.path: int(np.prod(weight.shape))
        for weight in ranker.body.trainable_variables
        if "bias" not in weight.path
    }
    return body, heads


@pytest.mark.parametrize("experts", [1, 4])
def test_multiply_adds_are_those_of_the_kernels(windows, sparse, experts):
    sparse = replace(sparse, num_experts=experts)
    features = num_features(windows, sparse)
    body, heads = kernels(windows, sparse)
    router = sum(size for path, size in body.items() if "router" in path)
    chosen = (sum(body.values()) - router) * min(2, experts) // experts
    assert multiply_adds(sparse, features) == chosen + router + heads
    dense = replace(sparse, body="shared_bottom", units=5)
    body, heads = kernels(windows, dense)
    assert multiply_adds(dense, features) == sum(body.values()) + heads


@pytest.mark.parametrize("units", [8, 64])
def test_a_dense_body_of_equal_cost(windows, sparse, units):
    sparse = replace(sparse, units=units)
    features = num_features(windows, sparse)
    dense = dense_of_equal_cost(sparse, features)
    assert dense == replace(sparse, body="shared_bottom", units=dense.units)
    one = multiply_adds(replace(dense, units=1), features)
    costs = [multiply_adds(body, features) for body in (dense, sparse)]
    assert abs(costs[0] - costs[1]) <= one / 2


class TestStudy:
    @pytest.fixture
    def fits(self, monkeypatch):
        """Fake fits: NDCG@10 is highest at 5e-3, and higher for the mixture."""
        fits = []

        def validate(windows, settings, seed):
            fits.append(("validate", settings.body, settings.learning_rate, seed))
            return {"validation_ndcg@10": 1 - abs(settings.learning_rate - 5e-3)}

        def run(windows, settings, seed):
            fits.append(("run", settings.body, settings.learning_rate, seed))
            return {"ndcg@10": 0.25 + (settings.body == "moe") * (1 + seed) / 8}

        def times(windows, bodies):
            return dict.fromkeys(bodies, 2.0)

        monkeypatch.setattr(tuned, "_validate", validate)
        monkeypatch.setattr(body_study, "metrics_of", run)
        monkeypatch.setattr(body_study, "_step_times", times)
        return fits

    def test_runs_the_best_on_validation_and_resumes(
        self, windows, sparse, fits, tmp_path
    ):
        lines = []
        arguments = (windows, sparse, 2, tmp_path, "tiny", lines.append)
        found = run_bodies(*arguments)
        assert list(found) == BODIES
        for studied in found.values():
            assert studied.settings.learning_rate == 5e-3
            assert (studied.ndcg, studied.milliseconds) == (1.0, 2.0)
        runs = [fit for fit in fits if fit[:2] == ("run", "moe")]
        assert runs == [("run", "moe", 5e-3, seed) for seed in (0, 1)]
        assert [m["ndcg@10"] for m in found[BODIES[0]].metrics] == [0.375, 0.5]
        assert len(fits) == 3 * (3 + 2)
        assert len(lines) == len(fits) + 1  # and the times
        sizes = [studied.parameters for studied in found.values()]
        assert sizes[1] < sizes[0]
        assert sizes[2] == pytest.approx(sizes[0], rel=0.01)
        fits.clear()
        assert run_bodies(*arguments) == found
        assert not fits

    def test_command(self, movielens, fits, tmp_path, capfd):
        from recsys_examples.movielens.__main__ import main

        command = processes.in_this_process(main, capfd)
        status, output, err = command(
            *("--study", "--quick", "--seeds", "2", "--body", "moe"),
            *("--data-dir", write_csv(tmp_path / "ml", movielens, users=12)),
            *("--out", tmp_path / "out"),
        )
        assert (status, err) == (0, "")
        assert "test window, 2 seeds" in output
        assert "equal parameters" in output
        record = check_study(tmp_path / "out", "bodies", output)
        # Differences 1/8 and 1/4: mean 3/16, deviation sqrt(2) / 16, error 1/16.
        assert record["findings"][0] == (
            "sparse MoE minus dense, equal FLOPs: NDCG@10 +0.1875 "
            "(standard error 0.0625), 2 seeds"
        )


@pytest.mark.usefixtures("eager_training")
def test_step_times_are_of_all_bodies(windows, sparse, monkeypatch):
    monkeypatch.setattr(body_study, "_BATCHES", 1)
    monkeypatch.setattr(body_study, "_REPEATS", 1)
    dense = replace(sparse, body="shared_bottom")
    times = body_study._step_times(windows, {"sparse": sparse, "dense": dense})
    assert set(times) == {"sparse", "dense"}
    assert min(times.values()) > 0


def test_table_by_hand(settings):
    """Differences 1/8 and 3/8: mean 1/4, deviation sqrt(2) / 8, error 1/8."""
    sizes = {"parameters": 12_345, "multiply_adds": 6_789, "milliseconds": 1.25}
    found = {
        "sparse MoE": Studied(
            settings, 0.5, [{"ndcg@10": 0.375}, {"ndcg@10": 0.875}], **sizes
        ),
        "dense": Studied(settings, 0.5, [{"ndcg@10": 0.25}, {"ndcg@10": 0.5}], **sizes),
    }
    table = bodies_table("A title", found)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["sparse MoE", "dense"]
    assert columns[1] == ["12,345"] * 2
    assert columns[2] == ["6,789"] * 2
    assert columns[-1] == ["-", "+0.2500 (0.1250)"]
