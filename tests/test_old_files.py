"""Models that an older version saved load, and give what they gave.

`tests/fixtures/make_old_models.py` made them.
"""

import json
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_moe  # noqa: F401 (registers the layers)

FOLDER = Path(__file__).parent / "fixtures"


def _release(version):
    return tuple(map(int, version.split(".")[:2]))


@pytest.mark.parametrize("name", ["tasks", "sparse"])
def test_an_old_model_gives_what_it_gave(name):
    with zipfile.ZipFile(FOLDER / f"{name}.keras") as file:
        saved_by = json.loads(file.read("metadata.json"))["keras_version"]
    if _release(keras.version()) < _release(saved_by):
        pytest.skip(f"saved by Keras {saved_by}, whose configs have new arguments")
    with np.load(FOLDER / f"{name}.npz") as arrays:
        known = {key: arrays[key] for key in arrays.files}
    inputs = {key[3:]: known[key] for key in known if key.startswith("in_")}
    model = keras.models.load_model(FOLDER / f"{name}.keras")
    outputs = model.predict(inputs, verbose=0)
    outputs = outputs if isinstance(outputs, dict) else {"score": outputs}

    assert {f"out_{key}" for key in outputs} == {k for k in known if k[:4] == "out_"}
    rounding = 1e-6 if keras.backend.backend() == "tensorflow" else 1e-5
    for key, output in outputs.items():
        expected = known[f"out_{key}"]
        np.testing.assert_allclose(output, expected, rtol=rounding, atol=rounding)
    assert model.compiled
