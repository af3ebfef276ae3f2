"""Exported layers run where keras_moe is not installed."""

import json

import keras
import numpy as np
import pytest

from tests.support import processes
from tests.support.layer_cases import CASES

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="SavedModel is TensorFlow's"
)

SERVER = """
import json, sys
from pathlib import Path
import numpy as np
import tensorflow as tf

folder = Path(sys.argv[1])
found = {}
for path in sorted(folder.iterdir()):
    serve = tf.saved_model.load(str(path / "model")).signatures["serving_default"]
    given = np.load(path / "inputs.npz")
    found[path.name] = [
        {
            name: tensor.numpy().tolist()
            for name, tensor in serve(**{k: given[k][:n] for k in given}).items()
        }
        for n in (1, 7)
    ]
print(json.dumps(found))
"""


def test_another_process_without_keras_moe_gets_the_same_numbers(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    expected = {}
    for case in CASES:
        inputs = {f"x{i}": x for i, x in enumerate(case.inputs(7))}
        tensors = {
            name: keras.Input(x.shape[1:], name=name, dtype=str(x.dtype))
            for name, x in inputs.items()
        }
        model = keras.Model(tensors, case.layer()(*tensors.values()))
        folder = models / case.name
        folder.mkdir()
        model.export(folder / "model", verbose=False)
        np.savez(folder / "inputs.npz", **inputs)
        expected[case.name] = [
            _by_name(model({name: x[:rows] for name, x in inputs.items()}))
            for rows in (1, 7)
        ]
    found = json.loads(
        processes.run_without(
            ["keras_moe"], SERVER, tmp_path, str(models)
        ).splitlines()[-1]
    )
    assert set(found) == set(expected)
    for name, answers in found.items():
        for outputs, wanted in zip(answers, expected[name], strict=True):
            assert set(outputs) == set(wanted)
            for output, values in outputs.items():
                np.testing.assert_allclose(
                    values, wanted[output], atol=1e-5, err_msg=name
                )


def _by_name(outputs):
    """Name outputs as the export does: by task, or output_0, output_1, ..."""
    if not isinstance(outputs, dict):
        outputs = outputs if isinstance(outputs, list) else [outputs]
        outputs = {f"output_{i}": output for i, output in enumerate(outputs)}
    return {name: np.asarray(output) for name, output in outputs.items()}
