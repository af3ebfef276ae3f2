"""Hash routing (Roller et al. 2021).

Axis letters: n tokens, e experts, k choices per token.

The experts of an integer id are a fixed function of the id. Nothing is trained.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _checks, routing
from keras_moe.routers._base import Router


@keras.saving.register_keras_serializable("keras_moe")
class HashRouter(Router):
    """Experts are a fixed function of an integer id.

    Nothing is learned; the weights are 1 / k. With `vocabulary_size` the function is a
    random table that assigns, for each of the k choices, the same number of ids (plus
    or minus one) to every expert. Otherwise it is a hash of the id, the same on every
    backend and in every process, balanced only in expectation.

    Args:
        num_experts: int, number of experts e.
        top_k: int, number of different experts per id, k.
        vocabulary_size: int, ids are in [0, vocabulary_size). Other ids are mapped to
            `id mod vocabulary_size`, which is never negative. By default ids may be any
            32-bit integers; of wider ids only the low 32 bits are used.
        seed: int >= 0, selects the table or the hash.

    Call arguments:
        tokens: integer tensor of shape `(n,)` or `(n, 1)`.
        mask: bool tensor of shape `(n,)`, False for padding.
        training: has no effect.

    Returns:
        A `Routing` without logits and probabilities.

    Attributes:
        table: int32 variable of shape `(vocabulary_size, k)`, not trainable; None
            without `vocabulary_size`. It is saved with the layer's weights.

    Raises:
        ValueError: if an argument is invalid, or the tokens are not ids.

    Example:

    >>> router = keras_moe.routers.HashRouter(num_experts=4, vocabulary_size=1000)
    >>> router(np.array([3, 14, 159])).expert_indices.shape == (3, 1)
    True

    References:
        - [Roller et al., 2021: Hash Layers For Large Sparse Models](
          https://arxiv.org/abs/2106.04426)
    """

    # The weights are constant.
    supported_losses = frozenset()
    reads_ids = True
    has_probs = False
    wrong_in_exports = frozenset({"openvino"})  # Its integers do not wrap around.

    def __init__(
        self,
        num_experts: int,
        top_k: int = 1,
        *,
        vocabulary_size: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, top_k, **kwargs)
        if vocabulary_size is not None:
            vocabulary_size = _checks.positive_int("vocabulary_size", vocabulary_size)
        self.vocabulary_size = vocabulary_size
        self.seed: int = _checks.count("seed", seed)
        self.table = None

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        if len(input_shape) != 1 and tuple(input_shape[1:]) != (1,):
            raise ValueError(
                "HashRouter expects ids of shape (n,) or (n, 1). "
                f"Received tokens of shape {tuple(input_shape)}"
            )
        if self.vocabulary_size is not None:
            self.table = self.add_weight(
                name="table",
                shape=(self.vocabulary_size, self.top_k),
                initializer=self._draw_table,
                dtype="int32",
                trainable=False,
                autocast=False,
            )

    def _draw_table(self, shape: tuple[int, int], dtype: Any = None) -> Any:
        """Return the table: ids in random order, assigned in rounds of e ids.

        In each round e ids get e different first choices. Choice j is a permutation of
        the first choices of the round, and is therefore balanced as well.
        """
        rng = np.random.default_rng(self.seed)
        e = self.num_experts
        rounds = -(-shape[0] // e)
        order = rng.permuted(np.tile(np.arange(e), (rounds, 1)), axis=1)
        shifts = rng.permuted(np.tile(np.arange(e), (rounds, 1)), axis=1)
        shifts = shifts[:, : self.top_k]
        positions = (np.arange(e)[None, :, None] + shifts[:, None, :]) % e
        assigned = np.take_along_axis(order[:, :, None], positions, axis=1)
        assigned = assigned.reshape(-1, self.top_k)[: shape[0]]
        return ops.convert_to_tensor(rng.permutation(assigned), dtype="int32")

    def call(
        self, tokens: Any, mask: Any = None, training: bool | None = None
    ) -> routing.Routing:
        dtype = keras.backend.standardize_dtype(tokens.dtype)
        if "int" not in dtype:
            raise ValueError(
                "HashRouter expects integer ids as tokens. Pass the ids to a `MoE` as "
                f"`router_inputs`. Received tokens of dtype {dtype}"
            )
        ids = ops.reshape(tokens, (-1,))
        if dtype.endswith(("8", "16")):
            ids = ops.cast(
                ids, "int32"
            )  # `vocabulary_size` may exceed the dtype's range.
        indices = self._from_hash(ids) if self.table is None else self._from_table(ids)
        weights = ops.ones_like(indices, dtype=self.precise_dtype) / self.top_k
        mask = None if mask is None else ops.cast(mask, "bool")
        return routing.Routing(indices, weights, mask=mask)

    def _from_table(self, ids: Any) -> Any:
        return ops.take(self.table, ops.mod(ids, self.vocabulary_size), axis=0)

    def _from_hash(self, ids: Any) -> Any:
        """(n,) -> (n, k): k different experts per id, by Floyd's sampling.

        Choice j is drawn from the first e - k + j + 1 experts; if it repeats an earlier
        choice, the last of these experts is used, which cannot be an earlier choice.
        Finally all choices are shifted by one more draw (mod e), which makes each of
        them uniform over the experts.
        """
        ids = ops.cast(ids, "int32")
        chosen: list[Any] = []
        for j in range(self.top_k):
            last = self.num_experts - self.top_k + j
            draw = ops.mod(_hash(ids, self.seed, j), last + 1)
            for earlier in chosen[:j]:
                draw = ops.where(earlier == draw, last, draw)
            chosen.append(draw)
        shift = ops.expand_dims(_hash(ids, self.seed, self.top_k), -1)
        shift = ops.mod(shift, self.num_experts)
        return ops.mod(ops.stack(chosen, axis=-1) + shift, self.num_experts)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "seed": self.seed,
        }


def _hash(ids: Any, *key: int) -> Any:
    """Return int32 hashes in [0, 2^31) of ids, pseudo-independent for different keys.

    A Feistel network on the 16-bit halves of an id. Its products stay below 2^31: no
    backend needs unsigned or 64-bit integers, and all give the same hash.
    """
    state = np.random.SeedSequence(key).generate_state(12, dtype=np.uint32)
    left = ops.bitwise_and(ops.right_shift(ids, 16), 0xFFFF)
    right = ops.bitwise_and(ids, 0xFFFF)
    for factor, offset in state.reshape(6, 2).tolist():
        # Odd, and large enough to carry low bits of the half into high bits.
        factor = factor % 2**14 + 2**14 - 1 | 1
        product = right * factor + offset % 2**15
        product = ops.bitwise_xor(product, ops.right_shift(product, 15))
        left, right = right, ops.bitwise_xor(left, ops.bitwise_and(product, 0xFFFF))
    return ops.bitwise_and(left, 0x7FFF) * 0x10000 + right
