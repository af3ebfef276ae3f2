"""Loads the SavedModels of runs; `recsys_examples.movielens.serving` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras_moe
from recsys_examples.errors import InputError
from recsys_examples.movielens.command import PRINTED
from recsys_examples.runs import find_saved_model


def load_signatures(run: Path) -> tuple[Path, dict[str, Any]]:
    """Load the signatures of a run or of a SavedModel, which must have `recommend`.

    Returns:
        The folder of the SavedModel, and its signatures by name.

    Raises:
        InputError: if there is no SavedModel with that signature, or it is damaged.
    """
    folder = find_saved_model(run)
    try:
        signatures = keras_moe.export.load_saved_model(folder).signatures
    except ValueError as error:
        raise InputError(str(error)) from error
    if "recommend" not in signatures:
        raise InputError(f'{folder} has no signature "recommend"')
    return folder, signatures


def load_recommender(run: Path, inputs: tuple[str, ...]) -> Any:
    """Load the `recommend` signature of a run or of a SavedModel.

    Args:
        run: the folder.
        inputs: names of the inputs that the signature must have.

    Raises:
        InputError: if there is no SavedModel with that signature, or it is damaged.
    """
    folder, signatures = load_signatures(run)
    signature = signatures["recommend"]
    found = sorted(signature.structured_input_signature[1])
    missing = {*PRINTED, "known_user"} - {*signature.structured_outputs}
    if found != sorted(inputs) or missing:
        raise InputError(
            f"{folder} is not a model of this example: its `recommend` signature must "
            f"take {sorted(inputs)} and return {[*PRINTED, 'known_user']}; it takes "
            f"{found} and returns {sorted(signature.structured_outputs)}"
        )
    return signature
