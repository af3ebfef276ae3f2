"""The contract of `tests/contracts.py`, held by every layer."""

import pytest

from tests import contracts
from tests.support.checks import not_on_jax
from tests.support.layer_cases import CASES

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

# What a compiler may get wrong. JAX compiles each case anew for every test: the other
# promises are kept by code that knows no backend.
BY_THE_COMPILER = {
    "compiled_equals_eager",
    "config_round_trip",  # compiles nothing
    "gradients_reach_every_weight",
    "no_rows",
}


@every_case
@pytest.mark.parametrize(
    "promise",
    [
        pytest.param(promise, marks=() if promise in BY_THE_COMPILER else not_on_jax)
        for promise in contracts.PROMISES
    ],
)
def test_promise(case, promise):
    contracts.PROMISES[promise](case)


@every_case
def test_file_round_trip(case, tmp_path):
    contracts.file_round_trip(case, tmp_path)


@every_case
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_dtype_policy(case, policy):
    contracts.dtype_policy(case, policy)
