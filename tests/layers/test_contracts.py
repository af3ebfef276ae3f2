"""The contract of `tests/contracts.py`, held by every layer."""

import pytest

from tests import contracts
from tests.cases import CASES

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
@pytest.mark.parametrize("promise", contracts.PROMISES)
def test_promise(case, promise):
    contracts.PROMISES[promise](case)


@every_case
def test_file_round_trip(case, tmp_path):
    contracts.file_round_trip(case, tmp_path)


@every_case
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_dtype_policy(case, policy):
    contracts.dtype_policy(case, policy)
