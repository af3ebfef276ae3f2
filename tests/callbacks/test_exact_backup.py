"""ExactBackup: an interrupted training ends bit-identical to one that was not."""

import json
import shutil
import signal

import keras
import numpy as np
import pytest

from keras_moe.callbacks import DatasetPosition, ExactBackup
from tests.support import interrupted, processes

EPOCHS = 3
BACKEND = keras.backend.backend()


class Interrupt(keras.callbacks.Callback):
    def __init__(self, batches):
        super().__init__()
        self._left = batches

    def on_train_batch_end(self, batch, logs=None):
        self._left -= 1
        if self._left == 0:
            raise InterruptedError


def _interrupt(folder, data, batches, model=None, **backup):
    with pytest.raises(InterruptedError):
        interrupted.train(
            folder, data, EPOCHS, [Interrupt(batches)], model=model, **backup
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return what an uninterrupted training finds, by its data."""
    known = {}

    def find(data):
        if data not in known:
            folder = tmp_path_factory.mktemp(data) / "backup"
            known[data] = interrupted.train(folder, data, EPOCHS)
            assert not folder.exists()  # deleted at the end
        return known[data]

    return find


@pytest.fixture(scope="module")
def after_seven_batches(tmp_path_factory):
    """The folder of a training that was interrupted in its second epoch."""
    folder = tmp_path_factory.mktemp("interrupted")
    _interrupt(folder, "fixed_order", 7)
    return folder


@pytest.fixture
def interrupted_at_7(after_seven_batches, tmp_path):
    return shutil.copytree(after_seven_batches, tmp_path / "copy")


@pytest.mark.parametrize("data", interrupted.DATA)
def test_an_interrupted_epoch_goes_on(data, whole, tmp_path):
    _interrupt(tmp_path, data, 9, every_steps=2)
    assert interrupted.train(tmp_path, data, EPOCHS, every_steps=2) == whole(data)


def test_backups_are_at_the_start_of_epochs_by_default(whole, tmp_path):
    _interrupt(tmp_path, "tf", 14)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "batch-000000000006-process-0.backup",
        "batch-000000000012-process-0.backup",
    ]
    assert interrupted.train(tmp_path, "tf", EPOCHS) == whole("tf")


@pytest.mark.parametrize("batches", [7, 13])
@pytest.mark.long
def test_any_epoch_goes_on_from_its_start(batches, whole, tmp_path):
    _interrupt(tmp_path, "tf", batches, every_steps=6)
    assert interrupted.train(tmp_path, "tf", EPOCHS) == whole("tf")


@pytest.mark.long
def test_several_interruptions_and_steps_per_execution(tmp_path):
    steps = 1 if BACKEND == "torch" else 2  # Keras on torch has no more.

    def model():
        return interrupted.make_model("pcgrad", steps_per_execution=steps)

    folder = tmp_path / "whole"
    whole = interrupted.train(folder, "tf", EPOCHS, model=model())
    folder = tmp_path / "interrupted"
    for batches in (4, 2, 5):
        _interrupt(folder, "tf", batches, model(), every_seconds=0)
    assert interrupted.train(folder, "tf", EPOCHS, model=model()) == whole


def test_a_damaged_backup_is_passed_over(whole, tmp_path):
    _interrupt(tmp_path, "tf", 9, every_steps=2)
    _, last = sorted(tmp_path.iterdir())
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=f"{last.name}.*the backup before is used"):
        found = interrupted.train(tmp_path, "tf", EPOCHS, every_steps=2)
    assert found == whole("tf")


@pytest.mark.parametrize("damage", ["empty", "flipped", "text", "folder"])
def test_no_whole_backup_is_named(damage, interrupted_at_7):
    path = interrupted_at_7 / "batch-000000000006-process-0.backup"
    content = bytearray(path.read_bytes())
    # In an array: some bits of a zip's own fields change nothing.
    content[content.index(b"NUMPY", len(content) // 2) + 130] ^= 1
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "flipped": content, "text": b"{}"}[damage])
    with (
        pytest.warns(UserWarning, match="the backup before is used"),
        pytest.raises(ValueError, match=f"{path.name}.*delete {interrupted_at_7}"),
    ):
        interrupted.train(interrupted_at_7, "fixed_order", EPOCHS)


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="`folder` must be a folder"):
            interrupted.train(path, "fixed_order", EPOCHS)


def test_another_model_is_refused(interrupted_at_7):
    inputs = keras.Input((6,))
    model = keras.Model(inputs, {"click": keras.layers.Dense(1)(inputs)})
    model.compile("sgd", "mse")
    x, y = interrupted.rows()
    backup = ExactBackup(interrupted_at_7, callbacks=[keras.callbacks.EarlyStopping()])
    with pytest.raises(ValueError, match="the model of `fit` must be that of the"):
        model.fit(x, {"click": y["click"]}, callbacks=[backup], epochs=3, verbose=0)


def test_a_model_with_other_layers_of_the_same_shapes_is_refused(tmp_path):
    x, y = interrupted.rows()

    def fit(names, interrupt=()):
        inputs = keras.Input((6,))
        hidden = inputs
        for name in names:
            hidden = keras.layers.Dense(6, name=name)(hidden)
        model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
        model.compile("adam", "mse")
        backup = ExactBackup(tmp_path, delete_at_end=False)
        model.fit(x, y["stars"], epochs=3, callbacks=[backup, *interrupt], verbose=0)

    with pytest.raises(InterruptedError):
        fit(["wide", None, "deep"], [Interrupt(5)])
    with pytest.raises(ValueError, match=r"variable 0: deep/kernel.*backup: wide/ker"):
        fit(["deep", None, "wide"])
    # Keras counts on in this process: `dense_1` is another number.
    fit(["wide", None, "deep"])


def test_callbacks_go_on_with_their_states(tmp_path):
    """Keras flips the sign of `min_delta` in the first epoch."""

    def callbacks():
        plateau = keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=0.2)
        return [plateau, keras.callbacks.EarlyStopping("loss", min_delta=0.2)]

    def fit(folder, interrupt=()):
        inputs = keras.Input((6,))
        keras.utils.set_random_seed(0)
        model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
        model.compile(keras.optimizers.SGD(1e-3), "mse")
        x, y = interrupted.rows()
        kept = callbacks()
        backup = ExactBackup(folder, callbacks=kept)
        history = model.fit(
            x, y["stars"], epochs=6, callbacks=[backup, *interrupt, *kept], verbose=0
        )
        return history.history, [c.min_delta for c in kept], model.get_weights()

    whole = fit(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        fit(tmp_path / "backup", [Interrupt(5)])
    found = fit(tmp_path / "backup")
    assert found[:2] == whole[:2]
    for value, expected in zip(found[2], whole[2], strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.fixture(scope="module")
def within_an_epoch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    _interrupt(folder, "fixed_order", 10, every_steps=2)
    return folder


class TestAnotherFit:
    """A program that is not the one that was interrupted: refused, nothing is lost."""

    @pytest.fixture
    def folder(self, within_an_epoch, tmp_path):
        copy = shutil.copytree(within_an_epoch, tmp_path / "copy")
        yield copy
        assert list(copy.glob("*.backup"))

    def test_shorter_epochs(self, folder):
        model = interrupted.make_model()
        x, y = interrupted.rows()
        stop = keras.callbacks.EarlyStopping("loss")
        backup = ExactBackup(folder, callbacks=[stop])
        x, y = x[:16], {task: labels[:16] for task, labels in y.items()}
        with pytest.raises(ValueError, match="must read the data of the backup"):
            model.fit(x, y, epochs=3, callbacks=[backup, stop], verbose=0)
        # The model trains as before.
        assert model.fit(x, y, verbose=0).history["loss"]

    def test_fewer_epochs(self, folder):
        with pytest.raises(ValueError, match="`epochs` of `fit` must be above 1"):
            interrupted.train(folder, "fixed_order", 1, every_steps=2)

    def test_other_callbacks(self, folder):
        model = interrupted.make_model()
        x, y = interrupted.rows()
        backup = ExactBackup(folder)
        with pytest.raises(ValueError, match="`callbacks` must be those of the backup"):
            model.fit(x, y, epochs=3, callbacks=[backup], verbose=0)


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_the_end_of_an_epoch_of_unknown_length(tmp_path):
    """On JAX the metrics of the epoch were lost: Keras gave the variables an old state.

    Keras asks for a seventh batch, before which there is a backup.
    """
    if keras.backend.backend() == "torch":
        pytest.skip("no data of unknown length")
    import tensorflow as tf

    class Interrupted(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise InterruptedError

    def fit(folder, *others):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,))
        model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
        model.compile("adam", "mse", metrics=["mae"])
        x, y = interrupted.rows()
        data = tf.data.Dataset.from_tensor_slices((x, y["stars"]))
        data = data.filter(lambda *_: True).batch(16)
        backup = ExactBackup(folder, every_steps=1)
        options = {"epochs": 2, "shuffle": False, "verbose": 0}
        history = model.fit(data, callbacks=[backup, *others], **options).history
        return history, model.get_weights()

    expected, weights = fit(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        fit(tmp_path / "part", Interrupted())
    assert (tmp_path / "part" / "batch-000000000006-process-0.backup").exists()
    found, again = fit(tmp_path / "part")
    assert found == expected
    for one, other in zip(again, weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_later_fit_is_not_changed(interrupted_at_7):
    model = interrupted.make_model()
    interrupted.train(interrupted_at_7, "fixed_order", EPOCHS, model=model)
    x, y = interrupted.rows()
    assert len(model.fit(x, y, epochs=2, verbose=0).history["loss"]) == 2


def test_a_state_that_cannot_be_saved_is_named(tmp_path):
    class Counts(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.counts = {1, 2}

    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    x, y = interrupted.rows()
    counts = Counts()
    backup = ExactBackup(tmp_path / "backup", callbacks=[counts])
    with pytest.warns(UserWarning, match=r"of Counts in `callbacks`, \['counts'\]"):
        model.fit(x, y["stars"], callbacks=[backup, counts], verbose=0)


def test_a_disk_that_is_full_does_not_end_the_training(whole, tmp_path):
    resource = pytest.importorskip("resource")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))

    try:
        with pytest.warns(UserWarning, match=r"no backup was written \(File too large"):
            found = interrupted.train(
                tmp_path, "tf", EPOCHS, [Full()], delete_at_end=False
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert found == whole("tf")
    (name,) = [path.name for path in tmp_path.iterdir()]
    assert name == "batch-000000000006-process-0.backup"


def test_a_killed_process_goes_on(whole, tmp_path):
    command = ["-m", "tests.support.interrupted", str(tmp_path), "--data", "tf"]
    command += ["--epochs", str(EPOCHS), "--every-steps", "1"]
    environment = {"KERAS_BACKEND": BACKEND}
    killed = processes.run([*command, "--kill", "0.01"], cwd=None, **environment)
    assert killed.returncode == -signal.SIGKILL
    done = processes.run(command, cwd=None, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["hash"], found["history"]) == whole("tf")


@pytest.mark.parametrize(
    "arguments",
    [
        {"folder": ""},
        {"folder": 3},
        {"every_steps": 0},
        {"every_steps": True},
        {"every_seconds": -1},
        {"every_seconds": float("nan")},
        {"delete_at_end": "yes"},
        {"data": object()},
        {"callbacks": ["early_stopping"]},
    ],
)
def test_bad_arguments_are_named(arguments):
    (name,) = arguments
    with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
        ExactBackup(**{"folder": "backup", **arguments})


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the others build it before")
def test_a_model_that_is_not_built_is_refused(tmp_path):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x, y = interrupted.rows()
    with pytest.raises(ValueError, match="must be built before `fit`"):
        model.fit(x, y["stars"], callbacks=[ExactBackup(tmp_path)], verbose=0)


def test_a_dataset_that_fit_does_not_read_is_named(tmp_path):
    tf = pytest.importorskip("tensorflow")
    rows = tf.data.Dataset.from_tensor_slices((np.ones((8, 6)), np.ones((8, 1))))
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    backup = ExactBackup(tmp_path, data=DatasetPosition(rows.batch(4)))
    with pytest.raises(ValueError, match="`data` must be a DatasetPosition whose"):
        model.fit(rows.batch(4), epochs=2, callbacks=[backup], shuffle=False, verbose=0)
    generated = tf.data.Dataset.from_generator(
        lambda: iter([(np.ones((4, 6)), np.ones((4, 1)))] * 2),
        output_signature=rows.batch(4, drop_remainder=True).element_spec,
    )
    generated = generated.apply(tf.data.experimental.assert_cardinality(2))
    position = DatasetPosition(generated)
    backup = ExactBackup(tmp_path, data=position)
    with pytest.raises(ValueError, match="`data` must be a pipeline whose state"):
        model.fit(
            position.dataset, epochs=2, callbacks=[backup], shuffle=False, verbose=0
        )
    with pytest.raises(TypeError, match=r"`dataset` must be a tf\.data\.Dataset"):
        DatasetPosition([1, 2])
