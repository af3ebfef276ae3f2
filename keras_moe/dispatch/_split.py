"""Split dispatch: the sorted rows in one piece per expert, computed separately.

Axis letters: n tokens, d input features, u output units, m = n * k rows.

It computes exactly the m chosen rows, but has data-dependent shapes.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_moe import _backend
from keras_moe.dispatch._sorted import in_sorted_rows
from keras_moe.experts._protocol import Experts
from keras_moe.routing import Routing, SortedChoices


def split(
    tokens: Any, routing: Routing, experts: Experts, training: bool | None = None
) -> Any:
    """Split the sorted rows into one piece per expert, and compute each separately."""
    if _backend.under_xla():
        raise ValueError(
            'dispatch="split" has data-dependent shapes, which XLA '
            "(`jit_compile=True`) and JAX cannot compile. "
            'Use dispatch="auto" or dispatch="blocked".'
        )

    if _backend.name() == "tensorflow" and _backend.on_accelerator():
        # TensorFlow keeps int32 tensors of a GPU on its host, and would wait for each.
        # With int64 it waits for the sizes of the pieces alone.
        indices = ops.cast(routing.expert_indices, "int64")
        routing = routing._replace(expert_indices=indices)

    def compute(rows: Any, runs: SortedChoices) -> Any:
        # The last piece has the rows without an expert and is not computed.
        last = ops.cast(ops.shape(rows)[0], runs.ends.dtype) - runs.ends[-1:]
        sizes = ops.concatenate([runs.ends - runs.starts, last])
        *pieces, rest = _backend.split_rows(rows, sizes, experts.num_experts + 1)
        outputs = experts.on_pieces(pieces, training=training)
        if routing.mask is not None or routing.combine_weights is None:
            shape = (ops.shape(rest)[0], outputs[0].shape[-1])
            outputs = [*outputs, ops.zeros(shape, outputs[0].dtype)]
        return ops.concatenate(outputs, axis=0)

    return in_sorted_rows(compute, tokens, routing, experts.num_experts)
