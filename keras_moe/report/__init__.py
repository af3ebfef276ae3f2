"""One HTML page about a training run: results, experts, alarms, settings, versions.

`report(run)` reads the folder of a run; `python -m keras_moe.report RUN` does the same.
"""

from keras_moe.report._page import report

__all__ = ["report"]
