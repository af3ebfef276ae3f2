"""A short run of the long profile: many callers of an exported model."""

import keras
import pytest

from keras_moe import export
from tests.robustness import serving

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a SavedModel is TensorFlow's"
)


@pytest.mark.parametrize("name", serving.MODELS)
@pytest.mark.long
def test_answers_errors_and_memory_hold_under_many_callers(name, tmp_path):
    export.export_saved_model(serving.MODELS[name](), tmp_path / "1")
    found = serving.soak(export.load(tmp_path / "1"), callers=64, seconds=6)
    outcome = found.outcome
    assert not outcome.failures
    assert outcome.tried == outcome.survived
    assert outcome.tried["valid"] > 64
    assert len(outcome.tried) >= 8
    assert found.growth <= serving.GROWTH
