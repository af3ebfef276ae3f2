"""Benchmarks of the library beside its peers, which are not part of the test suite."""
