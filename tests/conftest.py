"""What every test shares: names for the docstring examples, and quiet runs."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
# The float64 oracles need float64 on JAX, which computes in float32 by default.
os.environ.setdefault("JAX_ENABLE_X64", "1")
# Two processes share two cores; implicit warns about a threaded OpenBLAS.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest


@pytest.fixture(autouse=True)
def _seed():
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled():
    """JAX keeps all that it compiles, which came to 6 GiB in a process."""
    yield
    import keras

    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()


def pytest_collection_modifyitems(items):
    """One test runs the suite on another backend: it starts first, it takes longest."""
    items.sort(key=lambda item: "test_core_of_the_suite" not in item.name)
