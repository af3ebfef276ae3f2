"""Sight of the experts: what each mixture of a model does with a sample of rows.

`observe` reads the gates and routers of every mixture; `summarise` turns them into
figures; `gradient_conflict` compares the gradients of tasks; `signs_of_collapse` says
what looks wrong. `keras_moe.callbacks.ExpertMonitor` and `CollapseAlarm` do so during
`fit`. The layers know nothing of it: it reads what they expose, on every backend.

Similarities, `(e, e)`: `output_similarity` is the correlation of the outputs of two
experts on the sample; `kernel_similarity` the cosine of their kernels.
"""

from keras_moe.telemetry._collapse import Sign, rows_needed, signs_of_collapse
from keras_moe.telemetry._conflict import gradient_conflict
from keras_moe.telemetry._experts import (
    kernel_similarity,
    output_similarity,
    zero_activations,
)
from keras_moe.telemetry._figures import summarise
from keras_moe.telemetry._mixtures import Mixture, find_mixtures, observe

__all__ = [
    "Mixture",
    "Sign",
    "find_mixtures",
    "gradient_conflict",
    "kernel_similarity",
    "observe",
    "output_similarity",
    "rows_needed",
    "signs_of_collapse",
    "summarise",
    "zero_activations",
]
