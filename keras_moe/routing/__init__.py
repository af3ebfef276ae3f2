"""Who goes where: the records that routers write and dispatches read.

Axis letters: n tokens, e experts, k choices a token, c capacity (slots an expert),
m = n * k choices of all tokens, of which choice i * k + j is the j-th of token i.

Three kinds of record cover every router. In `Routing` each token chooses k experts, in
`ExpertChoiceRouting` each expert chooses c tokens, in `DenseRouting` each token goes to
every expert with a weight. A record is a named tuple of tensors: it passes through
compilers and `keras.tree`, and a router can be an operation of a functional model.
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
    Runs,
    Slots,
    checked_record,
)
from keras_moe.routing._slots import (
    capacity_slots,
    expert_capacity,
    shifted,
    sort_choices,
    tokens_in_rows,
)

__all__ = [
    "DenseRouting",
    "ExpertChoiceRouting",
    "Record",
    "Routing",
    "Runs",
    "Slots",
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
