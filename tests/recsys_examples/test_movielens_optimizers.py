"""`--optimizer`: the optimizer of a run, and the study that compares several."""

from dataclasses import replace

import pytest

from recsys_examples.movielens import optimizer_study, tuned
from recsys_examples.movielens.__main__ import OPTIMIZERS as NAMES
from recsys_examples.movielens.model import Settings
from recsys_examples.movielens.optimizer_study import (
    Studied,
    optimizers_table,
    run_optimizers,
)
from recsys_examples.movielens.training import OPTIMIZERS, fit_ranker
from tests.recsys_examples.test_movielens_command import check_study, write_csv
from tests.support import processes


def test_names_are_the_same_in_all_places():
    assert set(NAMES) == set(OPTIMIZERS) == set(optimizer_study.GRIDS)
    assert Settings().optimizer in NAMES


def test_every_optimizer_has_as_many_settings_to_choose_from():
    counts = {len(set(grid)) for grid in optimizer_study.GRIDS.values()}
    assert len(counts) == 1


@pytest.mark.usefixtures("eager_training")
@pytest.mark.parametrize("name", NAMES)
def test_the_ranker_is_trained_by_it(windows, settings, name):
    settings = replace(settings, optimizer=name, table_multiplier=4.0)
    fit = fit_ranker(windows.train, windows.catalogue, settings, epochs=1, verbose=0)
    optimizer = fit.ranker.training.optimizer
    assert type(optimizer) is OPTIMIZERS[name]
    assert isinstance(
        optimizer.get_config()["learning_rate"]["config"]["initial_learning_rate"],
        float,
    )
    if name in ("lazy_adam", "rowwise_adagrad"):
        assert optimizer.table_learning_rate_multiplier == 4.0


class TestStudy:
    @pytest.fixture
    def fits(self, monkeypatch):
        """Fake fits: NDCG@10 is highest at 5e-3, and higher for lazy_adam."""
        fits = []

        def validate(windows, settings, seed):
            fits.append(("validate", settings.optimizer, settings.learning_rate, seed))
            return {"validation_ndcg@10": 1 - abs(settings.learning_rate - 5e-3)}

        def run(windows, settings, seed):
            fits.append(("run", settings.optimizer, settings.learning_rate, seed))
            bonus = (1 + seed) / 8 if settings.optimizer == "lazy_adam" else 0.0
            return {"ndcg@10": 0.25 + bonus}

        monkeypatch.setattr(tuned, "_validate", validate)
        monkeypatch.setattr(optimizer_study, "metrics_of", run)
        return fits

    def test_runs_the_best_on_validation_and_resumes(self, windows, fits, tmp_path):
        names, lines = ["adam", "lazy_adam"], []
        arguments = (windows, Settings(), names, 2, tmp_path, "tiny", lines.append)
        found = run_optimizers(*arguments)
        assert list(found) == names
        for name in names:
            assert found[name].settings.learning_rate == 5e-3
            assert found[name].ndcg == 1.0
            runs = [fit for fit in fits if fit[:2] == ("run", name)]
            assert runs == [("run", name, 5e-3, seed) for seed in (0, 1)]
        assert [m["ndcg@10"] for m in found["lazy_adam"].metrics] == [0.375, 0.5]
        assert len(fits) == len(lines) == 2 * (4 + 2)
        fits.clear()
        again = run_optimizers(*arguments)
        assert again == found
        assert not fits

    def test_command(self, movielens, fits, tmp_path, capfd):
        from recsys_examples.movielens.__main__ import main

        command = processes.in_this_process(main, capfd)
        status, output, err = command(
            *("--study", "--quick", "--seeds", "2"),
            *("--optimizer", "adam", "lazy_adam"),
            *("--data-dir", write_csv(tmp_path / "ml", movielens, users=12)),
            *("--out", tmp_path / "out"),
        )
        assert (status, err) == (0, "")
        assert "test window, 2 seeds" in output
        assert "minus adam" in output
        record = check_study(tmp_path / "out", "optimizers", output)
        # Differences 1/8 and 1/4: mean 3/16, deviation sqrt(2) / 16, error 1/16.
        assert record["findings"][0] == (
            "lazy_adam minus adam: NDCG@10 +0.1875 (standard error 0.0625), 2 seeds"
        )


def test_table_by_hand():
    """Differences 1/8 and 3/8: mean 1/4, deviation sqrt(2) / 8, error 1/8."""
    settings = Settings(optimizer="rowwise_adagrad", learning_rate=0.25)
    found = {
        "adam": Studied(Settings(), 0.5, [{"ndcg@10": 0.25}, {"ndcg@10": 0.5}]),
        "rowwise_adagrad": Studied(
            settings, 0.5, [{"ndcg@10": 0.375}, {"ndcg@10": 0.875}]
        ),
    }
    table = optimizers_table("A title", found)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["adam", "rowwise_adagrad"]
    assert columns[1] == ["0.005", "0.25 (2.5)"]
    assert columns[4] == ["-", "+0.2500 (0.1250)"]
