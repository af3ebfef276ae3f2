"""The one place that states the version, read by the build without imports."""

__version__ = "0.1.0"
