"""The models: sizes, budgets, and the random search."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from keras_moe.layers import STEM
from recsys_examples.census_income import search
from recsys_examples.census_income.models import (
    MAX_EXPERT_UNITS,
    MODELS,
    Settings,
    build_models,
    expert_units,
    of_equal_size,
    parameters,
)
from recsys_examples.census_income.names import (
    CHOICES,
    EQUAL_BOTTOM,
    SHARED_BOTTOM,
    SINGLE_TASK,
)

TASKS = ("income", "never_married")
SIZES = {"table_rows": 50, "num_columns": 6, "num_numbers": 4}
SMALL = Settings(embedding=3, units=8, depth=2, tower=4)


def with_structure(model, index=0, settings=SMALL):
    return replace(settings, structure=MODELS[model].structures[index])


def build(model, settings=None, tasks=TASKS):
    return build_models(model, settings or with_structure(model), tasks, **SIZES)


def inputs(rows=5):
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 50, (rows, 6)).astype("int32"),
        rng.normal(size=(rows, 4)).astype("float32"),
    ]


def test_the_choices_are_the_models():
    assert tuple(MODELS) == CHOICES


class TestModels:
    @pytest.mark.parametrize("model", [*MODELS, EQUAL_BOTTOM])
    def test_a_logit_for_each_task(self, model):
        settings = SMALL if model == EQUAL_BOTTOM else with_structure(model)
        built = build(model, settings)
        outputs = {}
        for network in built:
            outputs |= network.predict(inputs(), verbose=0)
        assert list(outputs) == list(TASKS)
        for values in outputs.values():
            assert values.shape == (5, 1)
            assert values.std() > 0

    @pytest.mark.parametrize("model", MODELS)
    def test_every_structure_of_the_search_can_be_built(self, model):
        for index in range(len(MODELS[model].structures)):
            assert build(model, with_structure(model, index))

    def test_single_tasks_share_nothing(self):
        apart = build(SINGLE_TASK)
        assert [list(network.output) for network in apart] == [[t] for t in TASKS]
        first, second = ({id(w) for w in n.trainable_weights} for n in apart)
        assert not first & second
        assert len(build(SINGLE_TASK, tasks=("income",))) == 1
        assert len(build(SHARED_BOTTOM)) == 1

    def test_parameters_by_hand(self):
        # Inputs 6 * 3 + 4 = 22. Table 50 * 3; bottom (22 + 1) * 8 + (8 + 1) * 4; a
        # tower (4 + 1) * 4 + (4 + 1) * 1 for each of two tasks.
        expected = 150 + 184 + 36 + 2 * 25
        assert parameters(build(SHARED_BOTTOM)) == expected
        # One model per task: everything is doubled, except the towers.
        assert parameters(build(SINGLE_TASK)) == 2 * (150 + 184 + 36 + 25)

    def test_non_trainable_statistics_are_not_counted(self):
        (home,) = build("HoME")
        assert parameters([home]) < home.count_params()

    def test_stem_has_embeddings_for_each_task(self):
        (model,) = build("STEM")
        (table,) = [w for w in model.trainable_weights if w.path.startswith("cat")]
        assert table.shape == (50, 3 * 3)
        (stem,) = [layer for layer in model.layers if isinstance(layer, STEM)]
        # Inputs of each of the three streams: its columns of the table, the numbers.
        assert stem.experts[0].kernels[0].shape[-2] == 22
        before = model.predict(inputs(), verbose=0)
        changed = np.array(table)
        changed[:, 3:6] += 1.0  # the embeddings of the first task
        table.assign(changed)
        after = model.predict(inputs(), verbose=0)
        assert not np.allclose(before["income"], after["income"])

    def test_no_tower(self):
        with_tower = parameters(build(SHARED_BOTTOM))
        without = parameters(build(SHARED_BOTTOM, replace(SMALL, tower=0)))
        assert with_tower - without == 2 * (25 - 5)


class TestExpertUnits:
    def test_by_hand(self):
        def units(model, **structure):
            return expert_units(model, Settings(units=10, structure=structure))

        assert units(SHARED_BOTTOM) == units(SINGLE_TASK) == units(EQUAL_BOTTOM) == 10
        assert units("MMoE", num_experts=8) == 80
        assert units("sparse MMoE", num_experts=8, top_k=2) == 80
        extraction = {"num_levels": 2, "num_shared_experts": 3, "num_task_experts": 2}
        assert units("PLE", **extraction) == 10 * (2 + 2 + 3)
        assert units("AdaTT", **extraction) == 10 * (2 + 2 + 3)
        assert units("HoME", num_shared_experts=3, num_task_experts=2) == 10 * 9

    @pytest.mark.parametrize("model", MODELS)
    def test_equal_the_stacked_kernels(self, model):
        """The units of the widest level, from the shapes of the stacked kernels."""
        settings = with_structure(model, -1)
        (network, *_) = build(model, settings)
        stacked = [
            weight.shape[0] * weight.shape[-1]
            for weight in network.trainable_weights
            if len(weight.shape) == 3 and weight.shape[-1] == settings.units
        ]
        assert max(stacked, default=settings.units) == expert_units(model, settings)


class TestSearch:
    @pytest.mark.parametrize("model", [*MODELS, EQUAL_BOTTOM])
    def test_a_trial_is_deterministic(self, model):
        assert search.draw(model, 3, 1) == search.draw(model, 3, 1)
        drawn = [repr(search.draw(model, trial)) for trial in range(20)]
        assert len(set(drawn)) == 20
        assert search.draw(model, 3, 0) != search.draw(model, 3, 1)

    @pytest.mark.parametrize("model", MODELS)
    def test_budget(self, model):
        structures = set()
        for trial in range(300):
            settings = search.draw(model, trial)
            assert 0 < expert_units(model, settings) <= MAX_EXPERT_UNITS
            low, high = search.LEARNING_RATES
            assert low <= settings.learning_rate <= high
            structures.add(repr(settings.structure))
        assert len(structures) == len(MODELS[model].structures)

    def test_common_settings_are_equal_for_all_models(self):
        """Only `structure` and `units` may differ."""
        for trial in range(10):
            drawn = [asdict(search.draw(model, trial)) for model in MODELS]
            for settings in drawn:
                del settings["structure"], settings["units"]
            assert all(settings == drawn[0] for settings in drawn)


class TestEqualSize:
    @pytest.mark.parametrize("model", ["MMoE", "PLE", "HoME"])
    @pytest.mark.parametrize("depth", [1, 2])
    def test_within_one_percent(self, model, depth):
        target = parameters(build(model, replace(with_structure(model), units=64)))

        def count(settings):
            return parameters(build(EQUAL_BOTTOM, settings))

        found = of_equal_size(replace(SMALL, depth=depth), target, count)
        assert count(found) == pytest.approx(target, rel=0.01)
        assert replace(found, units=SMALL.units) == replace(SMALL, depth=depth)

    def test_nearest_by_hand(self):
        def count(settings):
            return 100 * settings.units

        for target, units in ((540, 5), (560, 6), (10, 1), (600, 6)):
            assert of_equal_size(SMALL, target, count).units == units
