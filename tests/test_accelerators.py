"""The cases and the page of the figures for TPU, without its compiler."""

import pytest

from tests.benchmarks import accelerators
from tests.benchmarks.accelerators import counterpart, label
from tests.benchmarks.accelerators_page import markdown, png, ratios_of, time_of

NONE = {"cycle_seconds": 0.0, "kernels": [], "gather_bytes": 0.0}


def _results(case, **figures):
    sizes = {"flops": 6e12, "bytes": 9e9, "temporary_bytes": 1e9}
    other = NONE | sizes | {"cycle_seconds": 0.04}
    dense = counterpart(case)
    entries = [(dense, other), (case, NONE | figures)]
    return {label(c): {"case": c, "figures": f} for c, f in entries}


def test_each_layer_has_its_dense_counterpart():
    cases = accelerators.cases()
    names = [label(case) for case in cases]
    assert len(set(names)) == len(names)
    for case in cases:
        if case["layer"] != "dense":
            assert label(counterpart(case)) in names


def test_ratios_by_hand():
    case = next(c for c in accelerators.cases() if c.get("dispatch") == "ragged")
    figures = {"flops": 9e12, "bytes": 27e9, "temporary_bytes": 2e9}
    # 10 ms of cycles, kernels of 1.97 TFLOP / 197 TFLOP/s (more than their bytes) and
    # 8.19 GB / 819 GB/s (more than their FLOPs), gathers of 8.19 GB / 819 GB/s.
    kernels = [(1.97e12, 4e9), (1e12, 8.19e9)]
    figures |= {"cycle_seconds": 0.01, "kernels": kernels, "gather_bytes": 8.19e9}
    results = _results(case, **figures)
    entry = results[label(case)]
    assert time_of(case, entry["figures"]) == pytest.approx(0.01 + 0.01 + 0.01 + 0.01)
    expected = {"flops": 1.5, "bytes": 3, "temporary_bytes": 2, "seconds": 1}
    assert ratios_of(entry, results) == pytest.approx(expected)
    page = markdown(results)
    assert "| 9.00 | 27.0 | 2.00 | 40 | 1.50 | 3.00 | 2.00 | 1.00 |" in page
    assert png(results).startswith(b"\x89PNG")


def test_the_page_names_the_goals_that_are_missed():
    case = next(c for c in accelerators.cases() if c["layer"] == "PLE")
    figures = {"flops": 6e12, "bytes": 36e9, "temporary_bytes": 2e9}
    page = markdown(_results(case, **figures, cycle_seconds=0.08))
    assert "Not reached: bytes of PLE (4.00), time of PLE (2.00)." in page


def test_a_program_that_does_not_fit_is_told():
    case = next(c for c in accelerators.cases() if c.get("dispatch") == "ragged")
    results = _results(case)
    results[label(case)]["figures"] = {"error": "RESOURCE_EXHAUSTED: 17G | 16G"}
    assert "| 8 | RESOURCE_EXHAUSTED: 17G / 16G |" in markdown(results)
