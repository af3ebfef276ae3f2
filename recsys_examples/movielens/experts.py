"""What each expert does for a recommendation.

The score of a task t is affine in the mixture h_t that its gate makes of the experts
(`model.py`), with what does not depend on the experts in `rest`:

    h_t = sum_e g_te f_e,   score_t(user, i) = <W_t h_t, v_i> + <l_t, h_t> + rest_t(i)

The *contribution* of an expert is the score minus the score without the expert: its
gate weight is set to zero, and the others of this gate are renormalized,

    h_t^-e = sum_{j != e} g_tj f_j / sum_{j != e} g_tj
    contribution_te(i) = <W_t (h_t - h_t^-e), v_i> + <l_t, h_t - h_t^-e>

This is exact, in the unit of the score: log odds for watch (before its calibration) and
like, stars for rating. Positive: the expert raises the movie. Weighted by 1 - g_te, the
contributions of a gate sum to zero, so an expert that says what the others say
contributes nothing, whatever its weight. Without any other expert, h_t^-e = 0.

Axis letters: b batch, t tasks, e experts, u output units, d dimensions of a vector, i
movies of the catalogue, k movies of a list.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_moe import routing
from keras_moe.layers import MoE, SharedBottom
from recsys_examples.errors import InputError
from recsys_examples.movielens.model import Ranker

NO_EXPERTS = (
    'body="shared_bottom" has no experts to explain; train with --body mmoe or moe'
)


class Contributions(keras.layers.Layer):
    """Gate weights of users, and what each expert contributes to movies' scores.

    Args:
        ranker: the trained models. Their weights are used, and none are added.

    Call arguments:
        features: dict of user features of b users.
        movies: (b, k) int, catalogue rows.
        vectors: (i, d), the vectors of all movies: `CatalogueScores.all_movies` of any
            task.

    Returns:
        Gate weights (b, t, e), the same for each task if the body is a sparse mixture;
        contributions (b, k, t, e), as defined at the top of the module; and their means
        over the catalogue (b, t, e), which move all movies alike.

    Raises:
        InputError: if the ranker has no experts.
    """

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        if isinstance(ranker.body, SharedBottom):
            raise InputError(NO_EXPERTS)
        self._rows, self._body = ranker.user, ranker.body
        named = ranker.catalogue.get_layer
        self._users = [named(f"user_{task}") for task in ranker.towers]
        self._levels = [named(f"level_{task}") for task in ranker.towers]

    def call(
        self, features: dict[str, Any], movies: Any, vectors: Any
    ) -> tuple[Any, Any, Any]:
        rows = self._rows(features, training=False)
        gates = gate_weights(self._body, rows, len(self._users))
        outputs = self._body.experts(rows, training=False)  # (b, e, u)
        mixed = ops.matmul(gates, outputs)  # (b, t, u)
        without = without_each(gates, outputs)  # (b, t, e, u)
        mean = ops.mean(vectors, axis=0)  # (d,)
        listed = ops.take(vectors, movies, axis=0)  # (b, k, d)
        found, means = [], []
        for t, (user, level) in enumerate(zip(self._users, self._levels, strict=True)):
            # The biases cancel.
            whole = ops.expand_dims(mixed[:, t], 1)
            users = user(whole) - user(without[:, t])  # (b, e, d)
            levels = ops.squeeze(level(whole) - level(without[:, t]), -1)  # (b, e)
            means.append(ops.matmul(users, mean) + levels)
            scores = ops.matmul(listed, ops.transpose(users, (0, 2, 1)))
            found.append(scores + ops.expand_dims(levels, 1))
        return gates, ops.stack(found, axis=2), ops.stack(means, axis=1)


def gate_weights(body: Any, rows: Any, num_tasks: int) -> Any:
    """Return the gate weights (b, t, e) in inference.

    Args:
        body: an `MMoE` or a `MoE`, whose tasks have the same mixture.
        rows: (b, features), what the body reads.
        num_tasks: the number of tasks, t.
    """
    if not isinstance(body, MoE):
        return body.gate_weights(rows)
    record, _ = body.route(rows)
    gates = routing.gates(record, body.num_experts, ops.shape(rows)[0])
    return ops.repeat(ops.expand_dims(gates, 1), num_tasks, axis=1)


def without_each(gates: Any, outputs: Any) -> Any:
    """Return the mixtures (b, t, e, u) without expert e, the others renormalized.

    Args:
        gates: (b, t, e), the gate weights.
        outputs: (b, e, u), the outputs of the experts.
    """
    kept = 1.0 - ops.eye(gates.shape[-1], dtype=gates.dtype)  # (removed e, e)
    others = ops.expand_dims(gates, 2) * kept  # (b, t, removed e, e)
    total = ops.sum(others, axis=-1, keepdims=True)
    others = ops.divide_no_nan(others, total)
    return ops.matmul(others, ops.expand_dims(outputs, 1))
