"""What every test shares: names for the docstring examples, and quiet runs."""

import gc
import math
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
# The float64 oracles need float64 on JAX, which computes in float32 by default.
os.environ.setdefault("JAX_ENABLE_X64", "1")
# Two processes share two cores: the threads of one would wait for those of the other.
# `implicit` warns about a threaded OpenBLAS.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

import pytest


@pytest.fixture(autouse=True)
def _seed():
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_python_stack_of_operations():
    """TensorFlow keeps the Python stack of every operation: 20% of the tests' time.

    An error in a graph then names this line as the place of its operation. To see the
    right one, set KERAS_MOE_STACKS=1.
    """
    import keras

    if keras.backend.backend() != "tensorflow" or os.environ.get("KERAS_MOE_STACKS"):
        yield
        return
    from tensorflow.python.util import tf_stack

    one = tf_stack.extract_stack()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf_stack, "extract_stack", lambda stacklevel=1: one)
        yield


def _resident_bytes():
    """Memory of this process; without Linux's account of it, infinity."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return math.inf
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True, scope="module")
def _limit_compiled_programs():
    """JAX keeps all programs that it compiles, which came to 6 GiB in a process."""
    yield
    import keras

    if keras.backend.backend() == "jax" and _resident_bytes() > 3 * 2**30:
        import jax

        jax.clear_caches()


def pytest_collection_finish():
    _exempt_from_collections()


@pytest.fixture(autouse=True, scope="module")
def _cheap_collections():
    """They visit what stays for ever: at 1.5 GiB, 12% of the CPU on JAX."""
    yield
    _exempt_from_collections()


def _exempt_from_collections():
    """Let no later garbage collection visit the objects that are alive now."""
    gc.collect()
    gc.freeze()


# The files that take longest, which start first: then both workers end together.
LONGEST = (
    "test_backends",
    "test_notebooks",
    "test_movielens_command",
    "test_two_stage_command",
    "test_census_command",
    "test_task_correlation_command",
    "test_click_conversion_command",
    "test_two_stage_pipeline",
    "test_tfrs",
    "test_keras_habits",
    "test_contracts",
)


def pytest_collection_modifyitems(items):
    def rank(item):
        stem = item.path.stem
        return LONGEST.index(stem) if stem in LONGEST else len(LONGEST)

    items.sort(key=rank)
