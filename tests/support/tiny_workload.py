"""A workload of no library, for the tests of the benchmarks."""

import os
import time

from tests.benchmarks.workload import Workload, repeated


def make(milliseconds=1.0, fault=""):
    """Return steps that sleep, and fail in the given way."""
    print("printed by a library")
    if fault == "make":
        raise ValueError("cannot be made")

    def step():
        print('{"seconds": 0}')
        time.sleep(milliseconds / 1e3)
        if fault == "step":
            raise ValueError("cannot be run")
        if fault == "death":
            os._exit(3)

    return Workload(run=repeated(step), parameters=7, facts={"flops": 8.0})
