"""The client: calls a signature of a SavedModel with a dict of features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_moe import _checks
from keras_moe.export import _requests
from keras_moe.export._loading import load_saved_model


def load(path: str | Path, signature: str = "serving_default") -> Served:
    """Return a signature of a SavedModel as a function of a dict of features.

    Args:
        path: the folder of a SavedModel.
        signature: the name of the signature.

    Raises:
        ValueError: if there is no SavedModel, one of its files is damaged, or it has no
            such signature. The message names the path, or the signature.
    """
    loaded = load_saved_model(path)
    _checks.one_of("signature", signature, loaded.signatures)
    return Served(loaded, signature)


class Served:
    """A signature of a SavedModel; errors name the invalid feature.

    Args:
        loaded: the return value of `tf.saved_model.load`.
        signature: the name of the signature.

    Call arguments:
        features: dict of one array per feature, with the batch as the first axis. An
            array must have the dtype of the feature; a list is converted.

    Returns:
        A dict of one NumPy array per task.

    Raises:
        ValueError: if a feature is missing, unknown, of the wrong dtype or shape, or
            fails the model's checks: NaN, infinity, ids outside of an embedding.
    """

    def __init__(self, loaded: Any, signature: str) -> None:
        self._loaded = loaded  # This reference keeps the variables alive.
        self._function = loaded.signatures[signature]
        self.features = self._function.structured_input_signature[1]
        self.tasks = tuple(sorted(self._function.structured_outputs))

    def __call__(self, features: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the outputs of the signature for one batch."""
        request = _requests.checked(self.features, features)
        outputs = _requests.call(lambda inputs: self._function(**inputs), request)
        return {name: value.numpy() for name, value in outputs.items()}
