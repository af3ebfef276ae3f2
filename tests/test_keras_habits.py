"""What Keras users do around a model, done to models of these layers."""

import contextlib
import gc
import shutil

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.callbacks import CombinedMonitor
from keras_moe.experts import GLUExperts, LayerExperts, MLPExperts
from keras_moe.layers import CGC, MMoE, MoE, PEPNet, SharedBottom, Tower
from keras_moe.multitask import MultiTaskModel, UncertaintyWeighting

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="TensorFlow is the home of fit"
)

ROWS = 48
TASKS = ["click", "stars"]
LOSSES = {"click": "binary_crossentropy", "stars": "mse"}
SILENT = {"verbose": 0, "batch_size": 16}

_rng = np.random.default_rng(0)
X = _rng.normal(size=(ROWS, 6)).astype("float32")
Y = {"click": (X[:, :1] > 0).astype("float32"), "stars": X[:, 1:2] * X[:, 2:3]}


def ranker(dispatch="auto", router="bias_balanced", weighting=None, **compiled):
    """A sparse mixture whose router has a state, gates, towers: every kind of part."""
    inputs = keras.Input((6,), name="row")
    sparse = MoE(4, (8, 6), router=router, dispatch=dispatch, name="moe")(inputs)
    shared = MMoE(8, (8, 5), TASKS, top_k=2, name="mmoe")(sparse + inputs)
    outputs = {
        "click": Tower((4,), "sigmoid", name="click")(shared["click"]),
        "stars": Tower((4,), name="stars")(shared["stars"]),
    }
    model = MultiTaskModel(inputs, outputs, loss_weighting=weighting)
    model.compile(
        **{"optimizer": keras.optimizers.Adam(0.01), "loss": LOSSES} | compiled
    )
    return model


def fit(model, epochs=1, callbacks=(), **kwargs):
    kwargs = {"shuffle": False, "validation_split": 1 / 3} | SILENT | kwargs
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **kwargs).history


def predictions(model, x=X):
    outputs = model(x, training=False)
    outputs = outputs if isinstance(outputs, dict) else {"": outputs}
    return {task: ops.convert_to_numpy(output) for task, output in outputs.items()}


def assert_same_predictions(one, other, x=X, atol=0.0, rtol=0.0):
    one, other = predictions(one, x), predictions(other, x)
    assert one.keys() == other.keys()
    for task, expected in one.items():
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(other[task], expected, rtol=rtol, atol=atol)


def state(model):
    """All that a step of training reads and writes."""
    kept = [*model.weights, *model.optimizer.variables]
    return [ops.convert_to_numpy(variable) for variable in kept]


class Recorder(keras.callbacks.Callback):
    """The weights after each epoch."""

    def on_train_begin(self, logs=None):
        self.weights = []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(self.model.get_weights())


def assert_same_arrays(one, other):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


# Callbacks


def test_tensorboard_shows_our_weights_losses_and_routing_metrics(tmp_path):
    tf = pytest.importorskip("tensorflow")
    pytest.importorskip("tensorboard")
    moe = MoE(4, (8, 5), routing_metrics=["load_cv"], dispatch="capacity", name="moe")
    layers = [keras.Input((6,)), moe, Tower((4,), name="top")]
    model = keras.Sequential(layers, name="ranker")
    model.compile("adam", "mse", jit_compile=True)
    board = keras.callbacks.TensorBoard(tmp_path, histogram_freq=1, write_graph=True)
    model.fit(
        X, Y["stars"], epochs=2, validation_split=1 / 3, callbacks=[board], **SILENT
    )
    shown = {"train": {}, "validation": {}}
    for run, steps in shown.items():
        for file in (tmp_path / run).glob("events*"):
            for record in tf.data.TFRecordDataset(str(file)):
                event = tf.compat.v1.Event.FromString(record.numpy())
                for value in event.summary.value:
                    steps.setdefault(value.tag, []).append(event.step)
    names = {weight.path.removeprefix("ranker/") for weight in model.weights}
    assert {"moe/router/kernel", "moe/experts/kernel_1", "top/hidden_0/bias"} <= names
    if "ranker/moe/router/kernel/histogram" in shown["train"]:
        for name in names:
            assert shown["train"][f"ranker/{name}/histogram"] == [0, 1], name
    else:  # Keras 3.12 shows the last part of the name.
        assert "kernel/histogram" in shown["train"]
    assert shown["train"]["keras"] == [0]  # The graph of the layers.
    for run in shown.values():
        assert run["epoch_loss"] == run["epoch_moe_load_cv"] == [0, 1]


@pytest.mark.parametrize("name", ["best.keras", "best.weights.h5"])
def test_a_checkpoint_of_the_best_epoch_gives_its_predictions(name, tmp_path):
    model = ranker(optimizer=keras.optimizers.SGD(2.0))
    recorder = Recorder()
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / name,
        monitor="val_loss",
        save_best_only=True,
        save_weights_only=name.endswith(".h5"),
    )
    losses = fit(model, 4, [recorder, checkpoint])["val_loss"]
    best = int(np.argmin(losses))
    assert best < 3  # The rate is too high on purpose.
    if name.endswith(".h5"):
        again = ranker()
        again.load_weights(tmp_path / name)
    else:
        again = keras.models.load_model(tmp_path / name, safe_mode=True)
    assert_same_arrays(again.get_weights(), recorder.weights[best])
    model.set_weights(recorder.weights[best])
    assert_same_predictions(model, again)


class StoppedError(Exception):
    pass


class StopIn(keras.callbacks.Callback):
    """Ends the process's fit, as a machine that goes down would."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise StoppedError


def test_an_interrupted_fit_goes_on_where_it_was(tmp_path):
    def make():
        return ranker(weighting=UncertaintyWeighting())

    whole, stopped, resumed = make(), make(), make()
    for model in (stopped, resumed):
        model.set_weights(whole.get_weights())
    fit(whole, 3)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(StoppedError):
        fit(stopped, 3, [backup, StopIn(2)])
    fit(resumed, 3, [keras.callbacks.BackupAndRestore(tmp_path / "backup")])
    assert int(resumed.optimizer.iterations) == int(whole.optimizer.iterations) == 6
    # With the bias that balances the router, the weights of the losses and Adam's.
    assert_same_arrays(state(resumed), state(whole))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_early_stopping_restores_the_best_weights(policy):
    with policies(policy):
        model = ranker(optimizer=keras.optimizers.SGD(2.0))
    recorder = Recorder()
    stopping = keras.callbacks.EarlyStopping(patience=1, restore_best_weights=True)
    losses = fit(model, 6, [recorder, stopping])["val_loss"]
    best = int(np.argmin(losses))
    assert best + 2 == len(losses) < 6
    assert_same_arrays(model.get_weights(), recorder.weights[best])


@contextlib.contextmanager
def policies(name):
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


def test_averaged_weights_are_what_is_validated_and_kept():
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
    model = ranker(optimizer=optimizer)
    averages = []

    def average(batch, logs):
        now = [ops.convert_to_numpy(v) for v in model.trainable_variables]
        before = averages or now
        averages[:] = [(a + b) / 2 for a, b in zip(before, now, strict=True)]

    by_hand = keras.callbacks.LambdaCallback(on_train_batch_end=average)
    swap = keras.callbacks.SwapEMAWeights()
    found = fit(model, 2, [by_hand, swap])["val_loss"][-1]
    for variable, expected in zip(model.trainable_variables, averages, strict=True):
        np.testing.assert_allclose(variable, expected, rtol=1e-5, atol=1e-6)
    rows, labels = X[32:], {task: Y[task][32:] for task in TASKS}
    assert found == pytest.approx(model.evaluate(rows, labels, verbose=0)[0], rel=1e-5)


def test_a_rate_of_zero_leaves_all_but_the_balance_as_it_is():
    model = ranker()
    before = model.get_weights()
    fit(model, 1, [keras.callbacks.LearningRateScheduler(lambda epoch: 0.0)])
    moved = [
        weight.path
        for weight, value in zip(model.weights, before, strict=True)
        if not np.array_equal(ops.convert_to_numpy(weight), value)
    ]
    assert moved == ["moe/router/expert_bias"]


# A search for the number of experts, their width and how many a row chooses


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:keras_tuner",
    # The tuner reads weights into models that have not been trained.
    "ignore:Skipping variable loading for optimizer:UserWarning",
)
def test_keras_tuner_searches_experts_units_and_top_k(tmp_path):
    keras_tuner = pytest.importorskip("keras_tuner")

    def build(hp):
        inputs = keras.Input((6,))
        shared = MMoE(
            hp.Int("num_experts", 2, 6, step=2),
            (hp.Choice("expert_units", [4, 8]), 4),
            TASKS,
            top_k=hp.Int("top_k", 1, 2),
        )(inputs)
        towers = {task: Tower((4,))(shared[task]) for task in TASKS}
        model = MultiTaskModel(inputs, towers)
        model.compile("adam", dict.fromkeys(TASKS, "mse"), jit_compile=False)
        return model

    def search(**kwargs):
        return keras_tuner.RandomSearch(
            build,
            objective="val_loss",
            max_trials=3,
            seed=1,
            directory=tmp_path,
            project_name="mmoe",
            **kwargs,
        )

    tuner = search()
    data = {"validation_data": (X[32:], {task: Y[task][32:] for task in TASKS})}
    tuner.search(
        X[:32], {task: Y[task][:32] for task in TASKS}, epochs=2, **data, **SILENT
    )
    trials = tuner.oracle.get_best_trials(3)
    tried = [tuple(trial.hyperparameters.values.values()) for trial in trials]
    assert len(set(tried)) == 3
    # Another process would find the search in its folder.
    best = search(overwrite=False).get_best_models()[0]
    values = trials[0].hyperparameters
    layer = next(layer for layer in best.layers if isinstance(layer, MMoE))
    assert layer.num_experts == values["num_experts"]
    assert layer.expert_units == (values["expert_units"], 4)
    assert layer.top_k == values["top_k"]
    best.compile(loss=dict.fromkeys(TASKS, "mse"))
    found = best.evaluate(*data["validation_data"], verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(trials[0].score, rel=1e-5)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:keras_tuner",
    "ignore:Skipping variable loading for optimizer:UserWarning",
)
def test_keras_tuner_chooses_by_a_figure_for_several_tasks(tmp_path):
    keras_tuner = pytest.importorskip("keras_tuner")

    def build(hp):
        inputs = keras.Input((6,))
        shared = MMoE(hp.Int("num_experts", 2, 3), 4, TASKS)(inputs)
        model = MultiTaskModel(
            inputs, {task: Tower(())(shared[task]) for task in TASKS}
        )
        model.compile("adam", dict.fromkeys(TASKS, "mse"), jit_compile=False)
        return model

    tuner = keras_tuner.RandomSearch(
        build,
        objective=keras_tuner.Objective("val_combined", "max"),
        max_trials=2,
        directory=tmp_path,
    )
    monitor = CombinedMonitor(
        {f"val_{task}_loss": -1.0 for task in TASKS}, name="val_combined"
    )
    labels = {task: Y[task][:32] for task in TASKS}
    tuner.search(
        X[:32], labels, validation_data=(X[:32], labels), callbacks=[monitor], **SILENT
    )
    for trial in tuner.oracle.get_best_trials(2):
        measured = trial.metrics.get_last_value
        total = sum(measured(f"val_{task}_loss") for task in TASKS)
        assert trial.score == pytest.approx(-total, rel=1e-5)


# Features in front


def test_a_feature_space_in_front_of_an_mmoe(tmp_path):
    tf = pytest.importorskip("tensorflow")
    features = {
        "country": _rng.choice(["de", "fr", "it"], ROWS),
        "device": _rng.choice(["phone", "desk"], ROWS),
        "age": _rng.integers(18, 80, ROWS).astype("float32"),
        "price": _rng.normal(size=ROWS).astype("float32"),
    }
    kinds = keras.utils.FeatureSpace
    space = kinds(
        features={
            "country": kinds.string_categorical(num_oov_indices=1),
            "device": kinds.string_categorical(num_oov_indices=1),
            "age": kinds.float_discretized(num_bins=4),
            "price": kinds.float_normalized(),
        },
        crosses=[kinds.cross(("country", "device"), crossing_dim=8)],
        output_mode="concat",
    )
    rows = tf.data.Dataset.from_tensor_slices((features, Y))
    space.adapt(rows.map(lambda row, _: row))
    encoded = space.get_encoded_features()
    shared = MMoE(4, (8, 4), TASKS)(encoded)
    towers = {
        "click": Tower((), "sigmoid", name="click")(shared["click"]),
        "stars": Tower((), name="stars")(shared["stars"]),
    }
    model = MultiTaskModel(encoded, towers)
    model.compile("adam", LOSSES)
    # 48 rows in batches of 20: the last batch is of another size.
    batches = rows.batch(20).map(lambda row, y: (space(row), y))
    losses = model.fit(batches, epochs=4, shuffle=False, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    # The same layers behind the raw features, as they are served.
    # (A plain dict: Keras warns of the one that the feature space tracks.)
    whole = MultiTaskModel(dict(space.get_inputs()), towers)
    whole.save(tmp_path / "whole.keras")
    again = keras.models.load_model(tmp_path / "whole.keras")
    raw = {name: tf.convert_to_tensor(x)[:, None] for name, x in features.items()}
    assert_same_predictions(whole, again, raw)
    expected = model.predict(batches.map(lambda row, _: row), verbose=0)
    found = again.predict(raw, verbose=0)
    for task in TASKS:
        np.testing.assert_allclose(found[task], expected[task], rtol=1e-5, atol=1e-6)


# Models of every style


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """Makes its parts in the constructor and has no more config than that."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.moe = MoE(4, (8, 6), router="bias_balanced")
        self.shared = CGC(1, 1, 5, TASKS)
        self.towers = {task: Tower((4,)) for task in TASKS}

    def call(self, inputs):
        shared = self.shared(self.moe(inputs))
        return {task: self.towers[task](shared[task]) for task in TASKS}


def sequential():
    layers = [keras.layers.Dense(5, "relu"), MoE(4, (8, 5)), Tower((4,), "sigmoid")]
    return keras.Sequential([keras.Input((6,)), *layers])


STYLES = {"functional": ranker, "sequential": sequential, "subclassed": Subclassed}


@pytest.mark.parametrize("style", STYLES)
def test_models_of_every_style_train_save_and_load(style, tmp_path):
    model = STYLES[style]()
    single = style == "sequential"
    model.compile(
        "adam", "mse", metrics=None if single else dict.fromkeys(TASKS, "mae")
    )
    rows = X.repeat(2, axis=0)[: ROWS + 3]  # A last batch of 3 rows.
    labels = {task: y.repeat(2, axis=0)[: ROWS + 3] for task, y in Y.items()}
    labels = labels["click"] if single else labels
    losses = model.fit(rows, labels, epochs=3, **SILENT).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    assert_same_predictions(model, again)
    # Training goes on alike, with the state of the optimizer.
    model.reset_metrics()  # Keras 3.12 counts the batches of `fit` too.
    one, other = [
        m.train_on_batch(rows, labels, return_dict=True) for m in (model, again)
    ]
    for name in one | other:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-6)
    assert_same_predictions(model, again, atol=1e-6)
    figures = model.get_metrics_result()
    assert figures.keys() == one.keys()
    assert single or {"loss", "click_mae", "stars_mae"} <= figures.keys()


@pytest.mark.parametrize("style", ["functional", "sequential"])
def test_a_clone_has_the_config_and_weights_of_its_own(style):
    model = STYLES[style]()
    clone = keras.models.clone_model(model)
    for layer, copy in zip(model.layers, clone.layers, strict=True):
        assert layer is not copy
        assert layer.get_config() == copy.get_config()
        for weight, other in zip(layer.weights, copy.weights, strict=True):
            assert weight is not other
            assert weight.path == other.path
            alike = np.array_equal(*map(ops.convert_to_numpy, (weight, other)))
            assert alike == ("bias" in weight.name), weight.path
    clone.set_weights(model.get_weights())
    assert_same_predictions(model, clone)


def test_the_config_of_a_multi_task_model_keeps_what_a_clone_does_not():
    model = ranker(weighting=UncertaintyWeighting())
    again = MultiTaskModel.from_config(model.get_config())
    assert isinstance(again.loss_weighting, UncertaintyWeighting)
    again.set_weights(model.get_weights())
    assert_same_predictions(model, again)


def test_the_summary_adds_up_and_shows_the_outputs_of_every_task():
    model = ranker()
    lines = []
    model.summary(print_fn=lines.append)
    rows = [line.split("│") for line in "\n".join(lines).splitlines()]
    shown = {row[1].strip(): row[2:4] for row in rows if len(row) > 3}
    # Router 24 + 4, experts 4 (6 * 8 + 8 + 8 * 6 + 6); gates 2 * 6 * 8, experts
    # 8 (6 * 8 + 8 + 8 * 5 + 5); towers 5 * 4 + 4 + 4 + 1.
    counts = {"moe (MoE)": 468, "mmoe (MMoE)": 904}
    counts |= {"click (Tower)": 29, "stars (Tower)": 29}
    for name, count in counts.items():
        assert shown[name][1].strip() == str(count), name
        assert model.get_layer(name.split()[0]).count_params() == count
    assert shown["mmoe (MMoE)"][0].strip() == "[(None, 5),"  # One for each task.
    text = "".join(lines)
    assert "Total params: 1,430 " in text
    assert "Trainable params: 1,426 " in text
    assert "Non-trainable params: 4 " in text


def test_plot_model_draws_our_layers(tmp_path):
    pytest.importorskip("pydot")
    if shutil.which("dot") is None:
        pytest.skip("Graphviz' program dot is not installed")
    graph = keras.utils.model_to_dot(ranker(), show_shapes=True, expand_nested=True)
    text = graph.to_string()
    for shown in ("MoE", "MMoE", "Tower", "[(None, 5), (None, 5)]"):
        assert shown in text
    file = tmp_path / "model.png"
    keras.utils.plot_model(ranker(), file, show_shapes=True, show_layer_names=True)
    assert file.read_bytes().startswith(b"\x89PNG")


# Weights carried between the dispatches


def test_weights_go_from_one_dispatch_to_every_other(tmp_path):
    trained = ranker(dispatch="split")
    fit(trained)
    trained.save_weights(tmp_path / "of_split.weights.h5")
    expected = predictions(trained)
    for way in ("auto", "dense", "blocked", "split"):
        fresh = ranker(dispatch=way)
        fresh.optimizer.build(fresh.trainable_variables)
        fresh.load_weights(tmp_path / "of_split.weights.h5")
        trained.get_layer("moe").dispatch = way
        trained.get_layer("mmoe").dispatch = way
        trained.compile(loss=LOSSES)
        for model in (fresh, trained):
            assert model.get_layer("moe").dispatch == way
            for task, found in predictions(model).items():
                np.testing.assert_allclose(found, expected[task], rtol=1e-4, atol=1e-5)


def test_weights_in_several_files(tmp_path):
    model, again = ranker(), ranker()
    model.save_weights(tmp_path / "all.weights.json", max_shard_size=4e-6)  # GB
    assert len(list(tmp_path.glob("*.h5"))) > 1
    again.load_weights(tmp_path / "all.weights.json")
    assert_same_predictions(model, again)


# Rows that count for more, and chance


def test_weights_of_classes_are_weights_of_rows():
    model = sequential()
    model.compile("sgd", "binary_crossentropy")
    again = keras.models.clone_model(model)
    again.set_weights(model.get_weights())
    labels = Y["click"]
    by_class = model.train_on_batch(X, labels, class_weight={0: 1.0, 1: 3.0})
    by_row = again.train_on_batch(X, labels, sample_weight=1 + 2 * labels[:, 0])
    assert by_class == pytest.approx(by_row, rel=1e-5)
    assert_same_predictions(model, again, atol=1e-6)


def test_two_fits_from_one_seed_are_the_same():
    ends = []
    for _ in range(2):
        keras.utils.set_random_seed(7)
        model = ranker(router="noisy_top_k")
        fit(model, shuffle=True)
        ends.append(model.get_weights())
    for one, other in zip(*ends, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# Smaller weights, and small ones beside large ones


def mixed():
    """Dense layers outside, as experts, in towers and in gates; and stacked kernels."""
    inputs = [keras.Input((6,)), keras.Input((3,))]
    rows = keras.layers.Dense(6, "relu")(inputs[0])
    rows = MoE(4, (8, 6), name="moe")(rows)
    narrow = [keras.layers.Dense(8, "relu"), keras.layers.Dense(5)]
    experts = LayerExperts([keras.layers.Dense(5), keras.Sequential(narrow)])
    shared = MMoE(2, None, TASKS, experts=experts)(rows)
    scaled = PEPNet(5, TASKS, name="pepnet")(*inputs)
    outputs = {
        task: Tower((4,), name=task)(shared[task] + scaled[task]) for task in TASKS
    }
    return MultiTaskModel(inputs, outputs)


@pytest.fixture
def quick_collections():
    """Keras collects garbage for every layer that it quantizes."""
    gc.freeze()
    yield
    gc.unfreeze()


def layers_inside(model):
    return model._flatten_layers(include_self=False)


# Keras warns of every layer that it leaves as it is.
@pytest.mark.usefixtures("quick_collections")
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_quantize_takes_dense_layers_and_leaves_stacked_kernels(tmp_path):
    model, x = mixed(), [X, X[:, :3]]
    before = predictions(model, x)
    with pytest.warns(UserWarning, match="MLPExperts does not have a `quantize`"):
        model.quantize("int8")
    found = predictions(model, x)
    for task, expected in before.items():
        distance = np.abs(found[task] - expected).max() / np.abs(expected).max()
        assert 0 < distance < 0.05
    dense = [x for x in layers_inside(model) if isinstance(x, keras.layers.Dense)]
    assert len(dense) == 1 + 3 + 2 * 2 + 2 * 2  # Two gates of PEPNet, two towers.
    assert {layer.quantization_mode for layer in dense} == {"int8"}
    assert {w.dtype for w in model.get_layer("moe").weights} == {"float32"}
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert_same_predictions(model, again, x)


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("mode", ["int4", "float8"])
def test_a_file_keeps_how_a_tower_was_quantized(mode, tmp_path):
    model = keras.Sequential([keras.Input((6,)), Tower((4,))])
    if mode == "int4":
        if not hasattr(keras.quantizers, "Int4QuantizationConfig"):
            pytest.skip("this Keras has no quantization configs")
        config = keras.quantizers.Int4QuantizationConfig(block_size=None)
        model.quantize(config=config)
    else:
        model.quantize(mode)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert_same_predictions(model, again)
    for layer in (again.layers[0].hidden[0], again.layers[0].output_unit):
        assert layer.quantization_mode == mode
        if mode == "int4":
            assert layer.quantization_config.block_size is None


UNQUANTIZED = {
    "MoE": lambda **kwargs: MoE(4, 5, **kwargs),
    "MMoE": lambda **kwargs: MMoE(4, 5, TASKS, **kwargs),
    "CGC": lambda **kwargs: CGC(1, 1, 5, TASKS, **kwargs),
    "SharedBottom": lambda **kwargs: SharedBottom(5, TASKS, **kwargs),
    "MLPExperts": lambda **kwargs: MLPExperts(4, 5, **kwargs),
    "GLUExperts": lambda **kwargs: GLUExperts(4, 5, **kwargs),
    "Tower": lambda **kwargs: Tower((4,), **kwargs),
}


@pytest.mark.parametrize("name", UNQUANTIZED)
def test_a_layer_that_cannot_be_quantized_says_its_name(name):
    layer = UNQUANTIZED[name]()
    layer(X)
    refusal = f"Layer {name} does not have a `quantize` method"
    with pytest.raises(NotImplementedError, match=refusal):
        layer.quantize("int8")
    with pytest.raises(NotImplementedError, match=f"Layer {name} does not have a"):
        UNQUANTIZED[name](dtype="int8_from_float32")(X)


def test_gptq_inside_a_tower_is_refused_before_a_file_is_lost():
    tower = Tower((4,), name="click")
    tower(X)
    config = keras.quantizers.GPTQConfig(dataset=["a"], tokenizer=list)
    tower.hidden[0].quantize("gptq", config=config)
    with pytest.raises(ValueError, match=r"'click' cannot be saved .*gptq"):
        keras.saving.serialize_keras_object(tower)


def test_lora_trains_beside_frozen_weights_and_is_kept_in_a_file(tmp_path):
    model, x = mixed(), [X, X[:, :3]]
    before = predictions(model, x)
    for layer in layers_inside(model):
        if hasattr(layer, "enable_lora"):
            layer.enable_lora(2)
    assert_arrays = np.testing.assert_array_equal
    for task, found in predictions(model, x).items():
        assert_arrays(found, before[task])
    for weight in model.trainable_variables:
        weight.trainable = "lora" in weight.path
    frozen = [ops.convert_to_numpy(v) for v in model.non_trainable_variables]
    assert len(model.trainable_variables) == 2 * 12
    model.compile("sgd", dict.fromkeys(TASKS, "mse"))
    model.fit(x, Y, epochs=2, **SILENT)
    assert_same_arrays(
        [ops.convert_to_numpy(v) for v in model.non_trainable_variables], frozen
    )
    for task, found in predictions(model, x).items():
        assert np.abs(found - before[task]).max() > 1e-3
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert_same_predictions(model, again, x, atol=1e-5)
    adapted = [layer for layer in layers_inside(again) if hasattr(layer, "enable_lora")]
    assert [layer.lora_rank for layer in adapted] == [2] * 12
    # Stacked kernels have none, and loops like the one above pass them by.
    assert not hasattr(model.get_layer("moe").experts, "enable_lora")
