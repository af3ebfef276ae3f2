"""Workloads of this library, and of Keras in the same environment."""
