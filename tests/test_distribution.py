"""Eight devices of JAX give the numbers of one, and split what they should."""

import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_moe.distribution import _expert_parallel, expert_parallel, save
from tests.support import processes

ROOT = Path(__file__).parent.parent
# The programs run once, so XLA need not optimize them; see tests/test_backends.py.
UNOPTIMIZED = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="started from TensorFlow's run"
)


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("jax")
    done = processes.run(
        ["-m", "tests.support.distributed_suite"],
        cwd=ROOT,
        timeout=1200,
        KERAS_BACKEND="jax",
        XLA_FLAGS=UNOPTIMIZED,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _assert_equal(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        for value, other in zip(values, found[name], strict=True):
            np.testing.assert_allclose(
                other, value, rtol=tolerance, atol=tolerance, err_msg=name
            )


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        ("all, 48 rows", "2 x 4"),
        ("few, 48 rows", "data"),
        ("few, 48 rows", "shared"),
        ("few, 45 rows", "2 x 4"),
    ],
)
def test_losses_outputs_gradients_and_state_are_those_of_one_device(found, case, mesh):
    expected = found[f"{case}, None"]
    assert len(expected) > 8
    _assert_equal(found[f"{case}, {mesh}"], expected, 1e-10)


@pytest.mark.parametrize(
    "case",
    [
        "shared, blocked_evenly, glu, True",
        "2 x 4, ragged, mlp, False",
        "data, ragged, mlp, True",
    ],
)
def test_no_choice_is_dropped_where_experts_are_split(found, case):
    """Also if all rows go to a device, whose room is a little above its share.

    Outputs, and gradients by weights, tokens and gates, in float64.
    """
    for routing, difference in found["split"][case].items():
        assert difference < 1e-10, routing
    assert min(found["split"]["beyond"]) > 0


def test_the_gradient_of_rows_beyond_the_room_drops_what_their_outputs_dropped(found):
    loss, product = found["split"]["dropout"]
    assert loss != 0
    np.testing.assert_allclose(product, loss, rtol=1e-10)


@pytest.mark.parametrize("mesh", ["data", "shared", "2 x 4"])
def test_a_device_multiplies_its_share_alone(found, mesh):
    """Experts are replicated, on the axis of the batch, or on their own axis."""
    assert 0.9 <= found["planned"]["share"][mesh] <= 1.2


def test_rows_that_the_devices_do_not_divide_are_warned_of(found):
    (message,) = {x for x in found["warned"] if "multiple" in x}
    assert "all of 45 rows" in message
    assert "the 2 devices of the axis 'batch'" in message


@pytest.mark.parametrize("mesh", ["shared", "2 x 4"])
def test_fit_gives_the_weights_and_metrics_of_one_device(found, mesh):
    """The bias of the router follows the load of the whole batch."""
    one, many = found["fit, None"], found[f"fit, {mesh}"]
    for part in ("history", "measured", "weights"):
        assert many[part].keys() == one[part].keys()
        for name, value in one[part].items():
            np.testing.assert_allclose(
                many[part][name], value, rtol=1e-4, atol=1e-4, err_msg=f"{part}: {name}"
            )
    bias = one["weights"]["moe/router/expert_bias"]
    assert np.ptp(bias) > 0


@pytest.mark.parametrize(("mesh", "parts"), [("shared", 8), ("2 x 4", 4)])
def test_experts_tables_and_their_slots_are_split(found, mesh, parts):
    shards = found[f"fit, {mesh}"]["shards"]
    split = [name for name, (whole, part) in shards.items() if whole != part]
    assert len(split) == 3 * sum(
        bool(re.search(r"experts|table", name))
        for name in found["fit, None"]["weights"]
    )  # Each weight with two slots of Adam.
    for name in split:
        whole, part = shards[name]
        assert part == [whole[0] // parts, *whole[1:]], name
    summary = found[f"fit, {mesh}"]["summary"]
    assert f"{8 // parts} of 8 experts" in summary
    assert "moe/router/kernel (10, 8) replicated: every token" in summary


def test_capacity_competes_within_a_part_of_the_batch(found):
    """Each part of 6 rows is a batch of its own; so it is not with one device."""
    parts = found["capacity"]
    np.testing.assert_allclose(parts["eight devices"], parts["eight batches"], 1e-6)
    assert not np.allclose(parts["eight devices"], parts["one device"])


def test_dropout_differs_between_devices_and_its_state_advances_once(found):
    """8 x the same 6 rows: equal masks would give equal rows."""
    outputs = np.reshape(found["dropout"]["outputs"], (8, 6, -1))
    assert not np.allclose(outputs[0], outputs[1])
    assert found["dropout"]["state"] == found["dropout"]["state of one device"]


@pytest.mark.parametrize(
    "case",
    [
        "evenly, data",
        "evenly, shared",
        "evenly, 2 x 4",
        "expert_choice, 2 x 4",
        "mmoe, shared",
        "mmoe, 2 x 4",
        "table",
    ],
)
def test_a_plan_has_the_figures_of_the_compiled_step(found, case):
    """Losses and counts of experts, which a plan leaves out, are small.

    The compiler counts a turn of each loop over rows that there is no room for.
    """
    for name, (compiled, planned) in found["planned"][case].items():
        rtol = 0.15 if name == "flops" else 0.1
        np.testing.assert_allclose(planned, compiled, rtol=rtol, err_msg=name)


def test_an_axis_for_tables_alone(found):
    """Devices along it compute the same: also the same dropout."""
    assert found["third axis"] == {"spread": 0.0, "accumulator": [32]}


@pytest.mark.parametrize("case", range(8))
def test_invalid_arguments(found, case):
    argument, rule, value = [
        ("mesh", "must not have more devices than there are, 8", "'expert': 4"),
        ("expert_axis", "must be an axis of `mesh`, one of ['batch']", "'expert'"),
        ("mesh", "divides the number of experts", "expert=4 for num_experts=6"),
        ("batch_size", "multiple of the size of the axis 'batch'", "batch_size=12"),
        ("model", "cannot be split", "LayerExperts"),
        ("model", "must be built", "Dense"),
        ("mesh", "must be a keras.distribution.DeviceMesh or a dict", "mesh=8"),
        ("model", "paths differ in numbers alone", "/embeddings'"),
    ][case]
    message = found["errors"][case]
    assert message.startswith(f"`{argument}`")
    assert rule in message
    assert value in message
    assert "\n" not in message


def test_experts_that_stay_whole_are_warned_of(found):
    (message,) = found["whole"]
    assert "the axis 'expert' of 4 devices does not divide them" in message
    assert "5 experts are not a multiple of 4 devices" in message


@pytest.mark.parametrize("path", ["item/embeddings", "moe/experts/kernel_0"])
def test_a_pattern_is_of_the_whole_path(path):
    """Keras 3.12 looks for it within a path, as `re.search` does."""
    pattern = _expert_parallel._without_numbers(path)
    name, weight = path.split("/", 1)
    assert re.search(pattern, path)
    assert re.search(pattern, f"{name}_3/{weight}")
    assert not re.search(pattern, f"last_{path}")
    assert not re.search(pattern, f"{path}_of_another")


def test_other_backends_are_refused():
    with pytest.raises(ValueError, match=r"needs the JAX backend.*MirroredStrategy"):
        expert_parallel(keras.layers.Dense(1), {"batch": 1})


def _saveable():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])


def test_save_replaces_a_file_by_a_complete_one(tmp_path, monkeypatch):
    model, path = _saveable(), tmp_path / "made" / "model.keras"
    save(model, path)
    before = path.read_bytes()

    def fails(path):
        Path(path).write_bytes(b"half")
        raise OSError("full")

    monkeypatch.setattr(model, "save", fails)
    with pytest.raises(OSError, match="full"):
        save(model, path)
    assert path.read_bytes() == before
    assert [found.name for found in path.parent.iterdir()] == ["model.keras"]
    save(model, tmp_path / "model.weights.h5")
    _saveable().load_weights(tmp_path / "model.weights.h5")


def test_a_model_without_its_weights_is_named(tmp_path):
    model = _saveable()
    model.layers[0].kernel._value = None  # As JAX leaves them after a failed step.
    with pytest.raises(ValueError, match="JAX loses them when a step fails"):
        save(model, tmp_path / "model.keras")


def test_save_names_what_it_cannot_save(tmp_path):
    with pytest.raises(ValueError, match=r"`path` must end with.*model\.h5"):
        save(_saveable(), tmp_path / "model.h5")
    with pytest.raises(ValueError, match="`model` must be built"):
        save(keras.Sequential([keras.layers.Dense(1)]), tmp_path / "model.keras")
