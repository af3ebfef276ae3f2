"""Measured comparisons; run by hand, not by the test suite."""
