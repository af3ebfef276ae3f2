"""Training examples and their labels.

An example is a user at a past point of time: the history until then, and the next few
movies that the user watched. All other movies that the user had not rated by then are
negatives for `watch`. `like` and `rating` have labels for the watched movies only.

Axis letters: b batch, u users, i movies of the catalogue, c movies watched next.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from recsys_examples.errors import InputError
from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.model import TASKS, Settings
from recsys_examples.movielens.ranking import LIKED

UNKNOWN_USER = 0  # MovieLens ids start at 1
_USER_ID_DROPOUT = 0.2  # fraction of examples with an unknown user id
_ALREADY_SEEN = -1.0


class Examples(keras.utils.PyDataset):
    """Splits each user's ratings into blocks, at another offset every epoch.

    Item j is a batch (features, labels, sample weights). The label of `watch` is
    (b, i): 1 watched next, 0 unseen, -1 already seen (not a candidate). Those of `like`
    and `rating` are (b, c, 1), with a sample weight (b, c) of 0 where the user's
    ratings end before the block does.

    Args:
        sequences: the ratings.
        catalogue: all movies.
        settings: block size and batch size.
        tasks: the tasks that get labels.
        seed: seed of the offsets, of shuffling and of the dropout of user ids.
        known: (u,) number of each user's first ratings that are only history. If
            given, the examples are for validation: the same in every epoch, with all
            user ids.
        equal_batches: whether all batches of all epochs have the same size, which
            avoids recompilation by XLA. A few examples of an epoch are then repeated
            or omitted.
    """

    def __init__(
        self,
        sequences: Sequences,
        catalogue: Catalogue,
        settings: Settings,
        tasks: tuple[str, ...] = TASKS,
        seed: int = 0,
        known: np.ndarray | None = None,
        equal_batches: bool = False,
    ) -> None:
        super().__init__()
        self._sequences, self._catalogue = sequences, catalogue
        self._settings, self._tasks = settings, tasks
        self._rng = np.random.default_rng(seed)
        self._known = known
        self._cut()
        # The number of examples varies between epochs, but Keras requires a constant
        # number of batches: the batch size varies instead.
        self._num_batches = -(-len(self._users) // settings.batch_size)
        self._equal_size = None
        if equal_batches and self._num_batches:
            self._equal_size = -(-len(self._users) // self._num_batches)
        if known is None and not len(self._users):
            raise InputError(
                "no training examples: no user has two ratings in the training window"
            )

    def get_state(self) -> dict[str, Any]:
        """Return the state of the generator: before this epoch was cut, and now."""
        return {"before": self._before, "now": self._rng.bit_generator.state}

    def set_state(self, state: dict[str, Any]) -> None:
        """Cut the epoch of `get_state` again."""
        self._rng.bit_generator.state = state["before"]
        self._cut()
        self._rng.bit_generator.state = state["now"]

    def _cut(self) -> None:
        self._before = self._rng.bit_generator.state
        block = self._settings.block
        lengths = self._sequences.lengths
        # The first movie has no history; after it, every `block`-th rating starts a
        # block.
        if self._known is None:
            offsets = self._rng.integers(1, block + 1, len(lengths))
            # Users with two ratings or more have at least one example.
            offsets = np.minimum(offsets, np.maximum(lengths - 1, 1))
        else:
            offsets = np.maximum(self._known, 1)
        counts = np.maximum(0, -(-(lengths - offsets) // block))
        users = np.repeat(np.arange(len(lengths)), counts)
        nth = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = self._rng.permutation(len(users))
        self._users = users[order]
        self._ends = (offsets[users] + nth * block)[order]

    def on_epoch_end(self) -> None:
        if self._known is None:
            self._cut()

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, index: int) -> tuple[dict, dict, dict]:
        batch = self._batch(index)
        users, ends = self._users[batch], self._ends[batch]
        features = self._sequences.histories(self._catalogue, users, ends)
        if self._known is None:
            hidden = self._rng.random(len(users)) < _USER_ID_DROPOUT
            features["user_id"] = np.where(hidden, UNKNOWN_USER, features["user_id"])

        starts = self._sequences.starts[users]
        steps = ends[:, None] + np.arange(self._settings.block)
        watched = steps < self._sequences.lengths[users][:, None]
        at = np.where(watched, starts[:, None] + steps, 0)
        movies = np.where(watched, self._sequences.movies[at], 0)
        stars = self._sequences.ratings[at]
        features["next_movies"] = movies.astype(np.int32)
        ones = np.ones(len(users), np.float32)
        defined = watched.astype(np.float32)
        labels = {
            "watch": self._watch_labels(starts, ends, movies, watched),
            "like": (stars >= LIKED).astype(np.float32)[..., None],
            "rating": stars[..., None],
        }
        weights = {"watch": ones, "like": defined, "rating": defined}
        return (
            features,
            {task: labels[task] for task in self._tasks},
            {task: weights[task] for task in self._tasks},
        )

    def _batch(self, index: int) -> slice | np.ndarray:
        if self._equal_size is not None:
            first = index * self._equal_size
            return np.arange(first, first + self._equal_size) % len(self._users)
        first, end = (len(self._users) * i // len(self) for i in (index, index + 1))
        return slice(first, end)

    def _watch_labels(
        self,
        starts: np.ndarray,
        ends: np.ndarray,
        movies: np.ndarray,
        watched: np.ndarray,
    ) -> np.ndarray:
        labels = np.zeros((len(starts), len(self._catalogue)), np.float32)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            labels[row, self._sequences.movies[start : start + end]] = _ALREADY_SEEN
            labels[row, movies[row, watched[row]]] = 1.0
        return labels


class LookedUp(keras.utils.PyDataset):
    """Examples for `Ranker.without_lookups`, with the ids looked up.

    Args:
        examples: the examples.
        lookups: `Ranker.lookups`.
    """

    def __init__(self, examples: Examples, lookups: keras.Model) -> None:
        super().__init__()
        self._examples, self._lookups = examples, lookups

    def on_epoch_end(self) -> None:
        self._examples.on_epoch_end()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[tuple, dict, dict]:
        features, labels, weights = self._examples[index]
        return tuple(self._lookups.predict_on_batch(features)), labels, weights
