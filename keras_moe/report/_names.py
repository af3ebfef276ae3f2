"""Names of the files in the folder of a run.

This module imports nothing: the examples load it without Keras.
"""

RECORD = "metrics.json"
EXPERTS = "experts.jsonl"
PAGE = "report.html"
