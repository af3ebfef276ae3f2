"""Routing records: the outputs of routers and inputs of dispatches.

Axis letters: n tokens, e experts, k choices per token, c capacity (slots per expert),
m = n * k choices of all tokens; choice i * k + j is the j-th of token i.

There are three kinds of record. In `Routing` each token chooses k experts, in
`ExpertChoiceRouting` each expert chooses c tokens, in `DenseRouting` each token goes to
every expert with a weight. A record is a named tuple of tensors: it works with
compilers, `keras.tree` and functional models.
"""

from keras_moe.routing._choices import (
    choose,
    expert_counts,
    gates,
    rows_where,
    top_k,
    union,
)
from keras_moe.routing._records import (
    DenseRouting,
    ExpertChoiceRouting,
    Record,
    Routing,
    Slots,
    SortedChoices,
    checked_record,
)
from keras_moe.routing._slots import (
    capacity_slots,
    expert_capacity,
    shifted,
    sort_choices,
    tokens_in_rows,
)

Runs = SortedChoices  # The former name, for existing imports.

__all__ = [
    "DenseRouting",
    "ExpertChoiceRouting",
    "Record",
    "Routing",
    "Runs",
    "Slots",
    "SortedChoices",
    "capacity_slots",
    "checked_record",
    "choose",
    "expert_capacity",
    "expert_counts",
    "gates",
    "rows_where",
    "shifted",
    "sort_choices",
    "tokens_in_rows",
    "top_k",
    "union",
]
