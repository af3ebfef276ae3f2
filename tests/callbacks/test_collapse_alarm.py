"""`CollapseAlarm`: driven collapses are found, healthy trainings give no alarm."""

import warnings

import keras
import numpy as np
import pytest

from keras_moe import layers, multitask, routers
from keras_moe.callbacks import CollapseAlarm, ExpertMonitor

TASKS = ["click", "stars"]
X = np.random.default_rng(0).normal(size=(400, 6)).astype("float32")
Y = np.abs(X[:, :1]) * X[:, 1:2]
LABELS = {"click": (X[:, :1] > 0).astype("float32"), "stars": X[:, 1:2]}


def sparse(**options):
    inputs = keras.Input((6,))
    moe = layers.MoE(4, (8, 6), name="moe", **options)
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs + moe(inputs)))
    model.compile(keras.optimizers.Adam(0.003), "mse")
    return model, moe


def gated(layer):
    inputs = keras.Input((6,))
    shared = layer(inputs)
    outputs = {task: layers.Tower((4,))(shared[task]) for task in TASKS}
    model = multitask.MultiTaskModel(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.003), "mse")
    return model


def alarms(model, y, epochs=3, **options):
    monitor = ExpertMonitor(X)
    alarm = CollapseAlarm(monitor, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = model.fit(
            *(X, y), epochs=epochs, callbacks=[monitor, alarm], verbose=0
        ).history
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    said = [text for text in said if text.startswith("epoch ")]
    assert len(said) == len(alarm.alarms)
    # Each warning points to the call of `fit` above.
    files = {w.filename for w in caught if str(w.message) in said}
    assert files <= {__file__}
    return alarm, said, history


def test_a_router_with_one_expert():
    model, moe = sparse(top_k=1, load_balancing_loss_weight=0.0)
    kernel = np.zeros((6, 4), "float32")
    moe.router.kernel.assign(kernel)
    moe.router.trainable = False
    # All logits equal: the first of the ties, expert 0, has all rows.
    model.compile("adam", "mse")
    alarm, said, _ = alarms(model, Y)
    kinds = {one.sign.kind: one for one in alarm.alarms}
    assert set(kinds) == {"dead expert", "dominant expert"}
    assert kinds["dead expert"].sign.experts == (1, 2, 3)
    assert kinds["dominant expert"].sign.experts == (0,)
    assert [one.epoch for one in alarm.alarms] == [1, 1]  # the second in a row
    assert any(
        text.startswith("epoch 2, dead expert: moe: experts 1, 2, 3 have")
        and "load_balancing_loss_weight" in text
        for text in said
    )


def test_gates_alike_and_polarized():
    mmoe = layers.MMoE(4, (8, 4), TASKS, name="mmoe", gate_use_bias=True)
    model = gated(mmoe)
    mmoe.gates.trainable = False
    model.compile("adam", "mse")
    for variable in mmoe.gates.weights:
        variable.assign(np.zeros(variable.shape, "float32"))
    alarm, _, _ = alarms(model, LABELS)
    assert [one.sign.kind for one in alarm.alarms] == ["gates alike"]
    bias = np.zeros((2, 4), "float32")
    bias[0, 1] = bias[1, 2] = 30.0
    mmoe.gates.biases[-1].assign(bias)
    alarm, said, _ = alarms(model, LABELS)
    kinds = [one.sign.kind for one in alarm.alarms]
    assert kinds == ["dead expert", "polarized gate", "polarized gate"]
    assert "the gate of click gives expert 1 100%" in " ".join(said)


def test_silent_units():
    model, moe = sparse()
    moe.experts.biases[0].assign(np.full((4, 8), -1000.0, "float32"))
    alarm, said, _ = alarms(model, Y)
    (one,) = [a for a in alarm.alarms if a.sign.kind == "silent units"]
    assert one.sign.experts == (0, 1, 2, 3)
    assert one.sign.figure == 1.0
    assert "smaller learning rate" in " ".join(said)


def test_experts_alike():
    mmoe = layers.MMoE(3, (8, 4), TASKS, name="mmoe")
    model = gated(mmoe)
    for weight in mmoe.experts.weights:
        value = np.array(keras.ops.convert_to_numpy(weight))
        weight.assign(np.repeat(value[:1], 3, axis=0))
    mmoe.experts.trainable = False
    model.compile("adam", "mse")
    alarm, _, _ = alarms(model, LABELS)
    assert "experts alike" in {one.sign.kind for one in alarm.alarms}


def test_stop():
    model, moe = sparse(top_k=1)
    moe.router.kernel.assign(np.zeros((6, 4), "float32"))
    moe.router.trainable = False
    model.compile("adam", "mse")
    _, _, history = alarms(model, Y, epochs=6, action="stop", patience=1)
    assert len(history["loss"]) == 1


def test_revive():
    router = routers.TopKRouter(4, 1, use_bias=True)
    model, moe = sparse(router=router, load_balancing_loss_weight=0.0)
    moe.router.bias.assign([0.0, -100.0, -100.0, -100.0])  # All rows go to expert 0.
    options = {"action": "revive", "patience": 1, "noise": 0.5, "seed": 1}
    alarm, _, _ = alarms(model, Y, epochs=1, **options)
    (dead,) = [one for one in alarm.alarms if one.sign.kind == "dead expert"]
    assert dead.sign.experts == (1, 2, 3)
    monitor = ExpertMonitor(X)
    model.fit(X, Y, epochs=1, callbacks=[monitor], verbose=0)
    usage = monitor.observations[-1]["mixtures"]["moe"]["relative_usage"]
    assert (usage > 0.01).sum() >= 3


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="trainings are alike"
)
@pytest.mark.parametrize(
    "seeds", [range(3), pytest.param(range(3, 10), marks=pytest.mark.long)]
)
def test_healthy_trainings_give_no_alarm(seeds):
    """A router, gates, and gates of two levels."""
    inputs = keras.Input((6,))
    for seed in seeds:
        keras.utils.set_random_seed(seed)
        hidden = inputs + layers.MoE(4, (8, 6))(inputs)
        shared = layers.MMoE(4, (8, 6), TASKS)(hidden)
        own = layers.PLE(2, 1, 2, (8, 4), TASKS)(hidden)
        model = multitask.MultiTaskModel(
            inputs,
            {task: layers.Tower(())(shared[task][:, :4] + own[task]) for task in TASKS},
        )
        model.compile(keras.optimizers.Adam(0.003), "mse")
        alarm, said, _ = alarms(model, LABELS, epochs=3)
        assert not alarm.alarms, (seed, said)


def test_a_sample_too_small_for_dead_experts():
    """40 experts need 800 rows; the 400 of the sample do not tell."""
    inputs = keras.Input((6,))
    moe = layers.MoE(40, (8, 6), top_k=1, name="moe", dispatch="dense")
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs + moe(inputs)))
    moe.router.kernel.assign(np.eye(6, 40, dtype="float32"))
    moe.router.trainable = False
    model.compile("adam", "mse")
    monitor = ExpertMonitor(X)
    alarm = CollapseAlarm(monitor)
    with pytest.warns(UserWarning, match="400 rows; with fewer than 800") as caught:
        model.fit(X, Y, epochs=3, callbacks=[monitor, alarm], verbose=0)
    assert [w.filename for w in caught if "more rows" in str(w.message)] == [__file__]
    assert not [one for one in alarm.alarms if one.sign.kind == "dead expert"]


def test_gates_that_give_each_row_one_expert():
    """A temperature near 0 polarizes, though the rows have different experts."""
    model = gated(layers.MMoE(4, (8, 4), TASKS, name="mmoe", gate_temperature=1e-3))
    alarm, said, _ = alarms(model, LABELS)
    signs = [one.sign for one in alarm.alarms if one.sign.kind == "polarized gate"]
    assert [(sign.gate, sign.experts) for sign in signs] == [
        ("click", ()),
        ("stars", ()),
    ]
    assert "the gate of stars gives one expert" in " ".join(said)


@pytest.mark.parametrize("static", [False, True])
def test_gates_that_choose_one_expert_by_design(static):
    for layer in (
        layers.DSelectK(4, (8, 4), TASKS, top_k=1, static=static),
        layers.MMoE(4, (8, 4), TASKS, top_k=1),
    ):
        alarm, _, _ = alarms(gated(layer), LABELS)
        kinds = {one.sign.kind for one in alarm.alarms}
        assert "polarized gate" not in kinds


def test_two_gates_on_one_expert():
    mmoe = layers.MMoE(4, (8, 4), [*TASKS, "stay"], name="mmoe", gate_use_bias=True)
    inputs = keras.Input((6,))
    shared = mmoe(inputs)
    outputs = {task: layers.Tower((4,))(shared[task]) for task in shared}
    model = multitask.MultiTaskModel(inputs, outputs)
    mmoe.gates.trainable = False
    model.compile("adam", "mse")
    bias = np.zeros((3, 4), "float32")
    bias[0, 1] = bias[1, 1] = 30.0
    mmoe.gates.biases[-1].assign(bias)
    alarm, _, _ = alarms(model, {**LABELS, "stay": X[:, 2:3]})
    signs = [one.sign for one in alarm.alarms if one.sign.kind == "polarized gate"]
    assert [(sign.gate, sign.experts) for sign in signs] == [
        ("click", (1,)),
        ("stars", (1,)),
    ]


class Scripted(CollapseAlarm):
    """Sees given dead experts in each observation."""

    script: tuple[tuple[int, ...], ...] = ()

    def _read_new(self):
        for seen in self._monitor.observations[self._read :]:
            figures = seen["mixtures"]["moe"]
            usage = np.full((1, 4), 1 / 4)
            usage[0, list(self.script[seen["epoch"]])] = 0.0
            figures |= {"usage": usage, "relative_usage": usage[0] * 4}
            figures["load"] = usage[0]
        super()._read_new()


def scripted(script, **options):
    model, _ = sparse()
    monitor = ExpertMonitor(X)
    alarm = Scripted(monitor, **options)
    alarm.script = script
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(*(X, Y), epochs=len(script), callbacks=[monitor, alarm], verbose=0)
    said = [str(w.message) for w in caught if str(w.message).startswith("epoch ")]
    return [(one.epoch, one.sign.experts, one.revived) for one in alarm.alarms], said


def test_a_collapse_that_grows_warns_again():
    found, _ = scripted(((3,), (3,), (3,), (2, 3), (2, 3), (2, 3)))
    assert found == [(1, (3,), ()), (4, (2, 3), ())]


def test_a_revived_expert_that_dies_again():
    found, said = scripted(((3,), (), (3,), (3,)), action="revive", patience=1)
    assert found == [(0, (3,), (3,)), (2, (3,), ())]
    assert said[0].endswith("Revived: 3")
    assert said[1].endswith("Revived before, and dead again: 3")


def test_revive_names_an_optimizer_that_it_cannot_reset():
    model, _ = sparse()
    model.compile(keras.optimizers.Adafactor(), "mse")
    monitor = ExpertMonitor(X)
    callbacks = [monitor, CollapseAlarm(monitor, action="revive")]
    with pytest.raises(ValueError, match="`optimizer` must have slots"):
        model.fit(X, Y, callbacks=callbacks, verbose=0)


class Alternating(CollapseAlarm):
    """Sees one dead expert in each observation, each time another."""

    def _read_new(self):
        for seen in self._monitor.observations[self._read :]:
            figures = seen["mixtures"]["moe"]
            usage = np.full((1, 4), 1 / 3)
            usage[0, seen["epoch"]] = 0.0
            figures |= {"usage": usage, "relative_usage": usage[0] * 4}
        super()._read_new()


def test_patience_is_that_of_each_expert():
    model, _ = sparse()
    monitor = ExpertMonitor(X)
    alarm = Alternating(monitor, patience=2)
    model.fit(X, Y, epochs=3, callbacks=[monitor, alarm], verbose=0)
    assert not alarm.alarms


def test_layers_that_cannot_be_revived_get_the_warning():
    ple = layers.PLE(2, 2, 1, (8, 4), TASKS, name="ple", gate_use_bias=True)
    model = gated(ple)
    ple.gates[0].trainable = False
    model.compile("adam", "mse")
    for variable in ple.gates[0].weights:
        variable.assign(np.zeros(variable.shape, "float32"))
    bias = np.zeros((2, 3), "float32")
    bias[:, 2] = -1000.0
    ple.gates[0].biases[-1].assign(bias)
    alarm, _, _ = alarms(model, LABELS, action="revive", patience=1)
    signs = [one.sign for one in alarm.alarms if one.sign.kind == "dead expert"]
    assert [(sign.mixture, sign.experts) for sign in signs] == [("ple/level_0", (3,))]


def test_values_that_are_not_finite():
    model, moe = sparse()
    moe.trainable = False
    model.compile("adam", "mse")
    moe.router.kernel.assign(np.full((6, 4), np.nan, "float32"))
    alarm, said, _ = alarms(model, np.zeros_like(Y), action="revive")
    assert [one.sign.kind for one in alarm.alarms] == ["not finite"]
    assert "FiniteGuard" in said[0]


def test_the_monitor_must_come_first():
    model, _ = sparse()
    monitor = ExpertMonitor(X)
    for callbacks in ([CollapseAlarm(monitor)], [CollapseAlarm(monitor), monitor]):
        with pytest.raises(ValueError, match="`monitor` must come before the alarm"):
            model.fit(X, Y, callbacks=callbacks, verbose=0)


def test_bad_arguments_are_named():
    monitor = ExpertMonitor(X)
    with pytest.raises(TypeError, match="`monitor` must be an ExpertMonitor"):
        CollapseAlarm("monitor")
    for name, value in [
        ("action", "cry"),
        ("patience", 0),
        ("noise", 0.0),
        ("seed", "x"),
        ("dead_share", 2.0),
        ("shares", 1.0),
    ]:
        with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
            CollapseAlarm(monitor, **{name: value})
