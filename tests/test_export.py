"""Files of every export format against the model that they come from."""

import functools

import keras
import numpy as np
import pytest

from keras_moe import export
from keras_moe.layers import PLE, MMoE, MoE, Tower
from keras_moe.multitask import MultiTaskModel
from tests.support.export_runtimes import runner

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="TensorFlow exports"
    ),
    # Keras asks NumPy 2 for names of NumPy 1, for tf2onnx's sake.
    pytest.mark.filterwarnings("ignore:In the future `np:FutureWarning"),
]
TASKS = ["click", "stars"]


def _multi_task(layer):
    inputs = keras.Input((8,), name="features")
    shared = layer(inputs)
    return MultiTaskModel(inputs, {task: Tower((4,))(shared[task]) for task in TASKS})


def _sparse(**kwargs):
    inputs = keras.Input((8,), name="features")
    mixed = MoE(6, (16, 8), name="mixture", **kwargs)(inputs)
    return keras.Model(inputs, {"score": Tower(())(mixed)})


MODELS = {
    "MMoE": lambda: _multi_task(MMoE(4, (16, 8), TASKS)),
    "sparse MMoE": lambda: _multi_task(MMoE(8, (16, 8), TASKS, top_k=2)),
    "PLE": lambda: _multi_task(PLE(2, 1, 1, (16, 8), TASKS)),
    "MoE, auto": lambda: _sparse(num_shared_experts=1),
    "MoE, dense": lambda: _sparse(dispatch="dense"),
    "MoE, capacity": lambda: _sparse(dispatch="capacity", capacity_factor=0.7),
    "MoE, blocked": lambda: _sparse(dispatch="blocked"),
    "MoE, split": lambda: _sparse(dispatch="split"),
}


@functools.cache
def _model(name):
    keras.utils.set_random_seed(3)
    return MODELS[name]()


def _rows(n):
    return np.random.default_rng(n).normal(size=(n, 8)).astype("float32")


def _assert_equal(found, expected):
    assert set(found) == set(expected)
    for task in expected:
        np.testing.assert_allclose(found[task], expected[task], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", export.FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_one_file_gives_the_models_outputs_at_any_batch_size(name, format, tmp_path):
    model, path = _model(name), tmp_path / f"file{export.FORMATS[format]}"
    export.export_model(model, path, format)
    run = runner(path, format)
    for n in (1000, 1, 7, 4096):
        _assert_equal(run(_rows(n)), model(_rows(n)))


def test_experts_choose_in_onnx_too(tmp_path):
    model = _sparse(router="expert_choice")
    export.export_model(model, tmp_path / "file.onnx", "onnx")
    run = runner(tmp_path / "file.onnx", "onnx")
    for n in (1000, 1):
        _assert_equal(run(_rows(n)), model(_rows(n)))


@pytest.mark.parametrize("format", export.FORMATS)
def test_routing_metrics_are_not_exported(format, tmp_path):
    model = _sparse(dispatch="capacity", routing_metrics=("load_cv",))
    model.compile("sgd", "mse")
    expected = model.evaluate(_rows(64), np.zeros((64, 1)), verbose=0, return_dict=True)
    assert expected["mixture_load_cv"] > 0
    path = tmp_path / f"file{export.FORMATS[format]}"
    export.export_model(model, path, format)
    _assert_equal(runner(path, format)(_rows(7)), model(_rows(7)))
    # They are still updated in the model itself.
    found = model.evaluate(_rows(64), np.zeros((64, 1)), verbose=0, return_dict=True)
    assert found == expected


def _saved_by_export_model(model, path):
    export.export_model(model, path, "tf_saved_model")


def _saved_by_keras(model, path):
    model.export(path, verbose=False)


@pytest.mark.parametrize("save", [_saved_by_export_model, _saved_by_keras])
def test_a_saved_model_does_not_update_routing_metrics(save, tmp_path):
    import tensorflow as tf

    model = _sparse(dispatch="capacity", routing_metrics=("load_cv", "expert_load"))
    save(model, str(tmp_path / "1"))
    served = tf.saved_model.load(str(tmp_path / "1"))
    graph = served.signatures["serving_default"].graph
    functions = graph.as_graph_def().library.function
    names = {node.op for function in functions for node in function.node_def}
    assert "MatMul" in names
    assert not {name for name in names if name.startswith("Assign")}


@pytest.mark.parametrize("format", ["onnx", "litert", "openvino"])
def test_what_a_format_has_no_operation_for_is_refused(format, tmp_path):
    inputs = keras.Input((8,), name="features")
    edges = keras.ops.convert_to_tensor([-1.0, 0.0, 1.0])
    binned = keras.layers.Lambda(
        lambda x: keras.ops.cast(keras.ops.searchsorted(edges, x[:, 0]), "float32"),
        name="binned",
    )(inputs)
    moe = MoE(6, (16, 8), dispatch="blocked")
    model = keras.Model(inputs, {"score": moe(inputs), "bin": binned})
    path = tmp_path / f"new/file{export.FORMATS[format]}"
    with pytest.raises(ValueError, match=f"'{format}' has.*LowerBound.*'binned'"):
        export.export_model(model, path, format)
    assert list(tmp_path.iterdir()) == []
    assert moe.dispatch == "blocked"


LAYERS = {
    ("openvino", "'mixture' that computes in bfloat16"): {"dtype": "mixed_bfloat16"},
    ("litert", "'mixture' that computes in float16"): {"dtype": "mixed_float16"},
}


@pytest.mark.parametrize(("format", "message"), LAYERS)
def test_layers_that_would_compute_otherwise_are_refused(format, message, tmp_path):
    inputs = keras.Input((8,), name="features")
    mixed = MoE(6, (16, 8), name="mixture", **LAYERS[format, message])(inputs)
    model = keras.Model(inputs, {"score": keras.layers.Dense(1)(mixed)})
    with pytest.raises(ValueError, match=message):
        export.export_model(model, tmp_path / f"f{export.FORMATS[format]}", format)
    assert list(tmp_path.iterdir()) == []


def test_hashed_ids_are_refused_for_openvino(tmp_path):
    inputs = [keras.Input((8,), name="features"), keras.Input((), name="user")]
    moe = MoE(6, (16, 8), router="hash", name="by_user")
    mixed = moe(inputs[0], router_inputs=keras.ops.cast(inputs[1], "int32"))
    model = keras.Model(inputs, {"score": keras.layers.Dense(1)(mixed)})
    with pytest.raises(ValueError, match=r"HashRouter.*'by_user'"):
        export.export_model(model, tmp_path / "f.xml", "openvino")
    assert list(tmp_path.iterdir()) == []


def test_one_name_for_an_input_and_an_output_is_refused(tmp_path):
    inputs = keras.Input((8,), name="features")
    model = keras.Model(inputs, {"features": keras.layers.Dense(1)(inputs)})
    with pytest.raises(ValueError, match=r"must not have the same name.*'features'"):
        export.export_model(model, tmp_path / "f.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_dispatch_is_changed_for_the_file_alone_as_onnx(tmp_path):
    model = _model("MoE, blocked")
    export.export_model(model, tmp_path / "file.onnx", "onnx")
    assert model.get_layer("mixture").dispatch == "blocked"


@pytest.mark.parametrize(
    ("format", "name"),
    [("tf_saved_model", "1"), ("onnx", "f.onnx"), ("openvino", "f.bin")],
)
def test_nothing_is_overwritten(format, name, tmp_path):
    (tmp_path / name).write_text("theirs")
    path = tmp_path / name.replace(".bin", ".xml")
    with pytest.raises(FileExistsError, match=name):
        export.export_model(_model("MMoE"), path, format)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["theirs"]


def _ports(inputs, outputs):
    """A model whose ports alone matter, of one Dense layer an output."""
    first = keras.tree.flatten(inputs)[0]
    return keras.Model(inputs, keras.tree.map_structure(lambda f: f(first), outputs))


def _input(**kwargs):
    return keras.Input((8,), **{"name": "features", **kwargs})


class _Subclassed(keras.Model):
    def call(self, inputs):
        return {"score": inputs}


def _called_sequential():
    model = keras.Sequential([keras.layers.Dense(1)])
    model(np.ones((2, 8)))
    return model


REFUSED = {
    "must be a dict": lambda: _ports(_input(), keras.layers.Dense(1)),
    "type list": lambda: _ports(_input(), [keras.layers.Dense(1)] * 2),
    "Received: 'output_0'": lambda: _ports(
        _input(), {"output_0": keras.layers.Dense(1)}
    ),
    "Received: 'keras_tensor": lambda: _ports(
        _input(name=None), {"score": keras.layers.Dense(1)}
    ),
    "Received: 'user age'": lambda: _ports(
        _input(name="user age"), {"score": keras.layers.Dense(1)}
    ),
    "'serving_default', which": lambda: _ports(
        _input(), {"serving_default": keras.layers.Dense(1)}
    ),
    "dtype=bfloat16": lambda: _ports(
        _input(), {"score": keras.layers.Dense(1, dtype="bfloat16")}
    ),
    "functional model": _Subclassed,
    "functional model.*built=False": lambda: keras.Sequential([keras.layers.Dense(1)]),
    # It has inputs and outputs, but no `input`: that was an AttributeError.
    "functional model.*Sequential": _called_sequential,
    "functional model.*None": lambda: None,
}


@pytest.mark.parametrize("format", ["tf_saved_model", "onnx"])
@pytest.mark.parametrize("message", REFUSED)
def test_a_signature_that_servers_could_mistake_is_refused(message, format, tmp_path):
    model = REFUSED[message]()
    with pytest.raises(ValueError, match=message):
        export.export_model(model, tmp_path / f"f{export.FORMATS[format]}", format)
    assert list(tmp_path.iterdir()) == []


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="`format` must be one of"):
        export.export_model(_model("MMoE"), tmp_path / "f", "caffe")
    with pytest.raises(ValueError, match=r"`path` must end in '\.onnx'"):
        export.export_model(_model("MMoE"), tmp_path / "f", "onnx")


@pytest.mark.parametrize("format", ["onnx", "litert", "openvino"])
def test_names_of_inputs_and_tasks_are_in_the_file(format, tmp_path):
    ports = {name: keras.Input((2,), name=name) for name in ("user", "item")}
    joined = keras.layers.Concatenate()([ports["user"], 10 * ports["item"]])
    model = keras.Model(
        ports, {task: keras.layers.Dense(1)(joined) for task in ("view", "buy")}
    )
    path = tmp_path / f"f{export.FORMATS[format]}"
    export.export_model(model, path, format)
    x = {name: _rows(5)[:, i : i + 2] for i, name in enumerate(ports)}
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        found = dict(zip(("view", "buy"), session.run(["view", "buy"], x), strict=True))
    elif format == "litert":
        from ai_edge_litert.interpreter import Interpreter

        served = Interpreter(str(path)).get_signature_runner("serving_default")
        found = served(**x)
    else:
        import openvino

        compiled = openvino.Core().compile_model(
            path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        outputs = compiled(x)
        found = {name: outputs[compiled.output(name)] for name in ("view", "buy")}
    _assert_equal(found, model(x))
