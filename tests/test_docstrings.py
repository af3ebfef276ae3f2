"""Every example in a docstring runs, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil

import keras
import numpy as np
import pytest

import keras_moe
import keras_moe.plots
import recsys_examples

# For another process, where tf.keras is Keras 2: see test_tfrs.py.
APART = ("keras_moe.tfrs", "recsys_examples.two_stage.tfrs_stack")
MODULES = sorted(
    module.name
    for package in (keras_moe, recsys_examples)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__") and module.name not in APART
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    names = {"keras": keras, "np": np, "keras_moe": keras_moe}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder().find(module, name):
        test.globs.update(names)
        runner.run(test)
    assert runner.failures == 0


@pytest.mark.parametrize(
    "public",
    [
        getattr(module, name)
        for module in (
            keras_moe.layers,
            keras_moe.multitask,
            keras_moe.multitask.gradients,
            keras_moe.multitask.weighting,
        )
        for name in module.__all__
        if inspect.isclass(getattr(module, name))
    ],
    ids=lambda public: public.__name__,
)
def test_public_classes_are_described(public):
    text = public.__doc__ or ""
    if issubclass(public, keras.layers.Layer) and not issubclass(public, keras.Model):
        assert "Returns:" in text
        assert "Example:" in text
    assert ">>> " in text or public is keras_moe.multitask.Rows
