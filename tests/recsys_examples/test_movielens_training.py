"""Examples, the watch loss, undefined labels, and training on tiny data."""

from collections import Counter
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from keras import ops

from recsys_examples.errors import InputError
from recsys_examples.movielens.features import Catalogue, Sequences
from recsys_examples.movielens.fusion import fuse, fused_scorer
from recsys_examples.movielens.labels import UNKNOWN_USER, Examples, LookedUp
from recsys_examples.movielens.model import TASKS, Settings, build_ranker
from recsys_examples.movielens.ranking import rank
from recsys_examples.movielens.training import (
    Validation,
    WatchLoss,
    compile_ranker,
    fit_ranker,
)


def one_movie_a_rating(lengths: list[int]) -> tuple[Sequences, Catalogue]:
    """Users with the given numbers of ratings; rating i is of the movie in row i."""
    count = sum(lengths)
    catalogue = Catalogue.from_movies(
        pd.DataFrame(
            {"movie_id": np.arange(count) + 1, "title": "", "genres": "War"}
        ).assign(year=0)
    )
    users = np.arange(len(lengths)) + 1
    ratings = pd.DataFrame(
        {
            "user_id": np.repeat(users, lengths),
            "movie_id": catalogue.movie_ids,
            "rating": 4.0,
            "timestamp": 0,
        }
    )
    return Sequences.from_ratings(ratings, catalogue, users), catalogue


LENGTHS = [1, 2, 5, 6, 7, *range(10, 40)]


def predicted_ratings(examples: Examples) -> Counter[int]:
    """Count how often each rating is a label; its history must end right before it."""
    found = Counter()
    for item in range(len(examples)):
        features, _, weights = examples[item]
        for history, movies, defined in zip(
            features["history"], features["next_movies"], weights["like"], strict=True
        ):
            block = movies[defined > 0].tolist()
            latest = history[0] - 1  # an id is one more than the row
            assert block == list(range(latest + 1, latest + 1 + len(block)))
            found.update(block)
    return found


def by_hand(**settings) -> Examples:
    """Movies 10 to 60 are rows 0 to 5; user 7 saw 0 1 2 3 4, and user 8 saw 5 0."""
    catalogue = Catalogue.from_movies(
        pd.DataFrame(
            {
                "movie_id": [10, 20, 30, 40, 50, 60],
                "title": "",
                "genres": "Drama",
                "year": 1990,
            }
        )
    )
    ratings = pd.DataFrame(
        {
            "user_id": [7] * 5 + [8] * 2,
            "movie_id": [10, 20, 30, 40, 50, 60, 10],
            "rating": [4.0, 3.5, 5.0, 0.5, 4.5, 2.0, 4.0],
            "timestamp": range(7),
        }
    )
    sequences = Sequences.from_ratings(ratings, catalogue, np.array([7, 8]))
    return Examples(
        sequences, catalogue, Settings(block=2), known=np.array([2, 1]), **settings
    )


class TestExamplesByHand:
    @pytest.fixture(scope="module")
    @classmethod
    def item(cls):
        features, labels, weights = by_hand()[0]
        # The order is random: sort by user, then by the length of the history.
        order = np.lexsort(
            (np.count_nonzero(features["history"], 1), features["user_id"])
        )
        return [
            {name: values[order] for name, values in part.items()}
            for part in (features, labels, weights)
        ]

    def test_one_example_per_block(self, item):
        # User 7 after 2 ratings, with next movies 2 and 3, and after 4 ratings, with
        # next movie 4; user 8 after 1 rating.
        features = item[0]
        assert features["user_id"].tolist() == [7, 7, 8]
        assert features["history"][:, :5].tolist() == [
            [20, 10, 0, 0, 0],
            [40, 30, 20, 10, 0],
            [60, 0, 0, 0, 0],
        ]
        assert features["next_movies"].dtype == np.int32
        assert features["next_movies"][:, 0].tolist() == [2, 4, 0]
        assert features["next_movies"][0, 1] == 3

    def test_watch_labels(self, item):
        assert item[1]["watch"].tolist() == [
            [-1, -1, 1, 1, 0, 0],
            [-1, -1, -1, -1, 1, 0],
            [1, 0, 0, 0, 0, -1],
        ]

    def test_like_and_rating_where_they_are_defined(self, item):
        _, labels, weights = item
        defined = [[1, 1], [1, 0], [1, 0]]
        assert weights["like"].tolist() == weights["rating"].tolist() == defined
        assert weights["watch"].tolist() == [1, 1, 1]
        assert labels["rating"].shape == labels["like"].shape == (3, 2, 1)
        at = np.array(defined, bool)
        assert labels["rating"][at][:, 0].tolist() == [5.0, 0.5, 4.5, 4.0]
        # 4 stars or more are liked.
        assert labels["like"][at][:, 0].tolist() == [1, 0, 1, 1]

    def test_only_labels_of_the_given_tasks(self):
        _, labels, weights = by_hand(tasks=("like",))[0]
        assert set(labels) == set(weights) == {"like"}


class TestTrainingExamples:
    def test_each_rating_once_from_the_first_block_on(self, settings):
        sequences, catalogue = one_movie_a_rating(LENGTHS)
        examples = Examples(sequences, catalogue, settings)
        all_epochs = set()
        for _ in range(30):  # epochs
            found = predicted_ratings(examples)
            assert set(found.values()) == {1}
            for start, length in zip(sequences.starts, LENGTHS, strict=False):
                own = [at - start for at in sorted(found) if 0 <= at - start < length]
                # The first block begins at one of the first `block` ratings that have
                # a history.
                first = own[0] if own else length
                assert 1 <= first <= settings.block
                assert own == list(range(first, length))
            all_epochs.update(found)
            examples.on_epoch_end()
        # Over all epochs, all ratings are labels, except for each user's first.
        assert all_epochs == set(range(sum(LENGTHS))) - set(sequences.starts[:-1])

    def test_blocks_depend_on_epoch_and_seed(self, windows, settings):
        one, same, other = (
            Examples(windows.train, windows.catalogue, settings, seed=seed)
            for seed in (1, 1, 2)
        )
        first = one[0][0]["history"]
        np.testing.assert_array_equal(same[0][0]["history"], first)
        assert other[0][0]["history"].tobytes() != first.tobytes()
        one.on_epoch_end()
        assert one[0][0]["history"].tobytes() != first.tobytes()

    def test_dropout_of_user_ids(self, windows, settings):
        examples = Examples(windows.train, windows.catalogue, settings)
        found = [examples[i][0] for i in range(len(examples))]
        ids = np.concatenate([features["user_id"] for features in found])
        # A fraction of 0.2 of about 240 examples: standard deviation 0.026.
        assert 0.1 < np.mean(ids == UNKNOWN_USER) < 0.3
        known = ids[ids != UNKNOWN_USER]
        assert np.isin(known, windows.train.user_ids).all()

    @pytest.mark.parametrize("seed", range(5))
    def test_two_ratings_always_give_an_example(self, seed):
        """One rating gives no example; two give one, for any offset."""
        sequences, catalogue = one_movie_a_rating([2, 1, 2, 2, 1, 2])
        examples = Examples(sequences, catalogue, Settings(batch_size=2), seed=seed)
        for _ in range(3):
            sizes = [len(examples[i][0]["user_id"]) for i in range(len(examples))]
            assert sizes == [2, 2]
            examples.on_epoch_end()

    def test_no_examples_raises(self):
        with pytest.raises(InputError, match="no user has two ratings"):
            Examples(*one_movie_a_rating([1, 1]), Settings())


class TestValidationExamples:
    @pytest.fixture(scope="module")
    @classmethod
    def examples(cls, windows, settings):
        return Examples(
            windows.before_test,
            windows.catalogue,
            settings,
            known=windows.train.lengths,
        )

    def test_exactly_the_window(self, settings):
        sequences, catalogue = one_movie_a_rating(LENGTHS)
        known = np.array([length - length // 3 for length in LENGTHS])
        examples = Examples(sequences, catalogue, settings, known=known)
        found = predicted_ratings(examples)
        expected = {
            start + at
            for start, first, length in zip(
                sequences.starts, known, LENGTHS, strict=False
            )
            for at in range(first, length)
        }
        assert set(found) == expected
        assert set(found.values()) == {1}

    def test_the_same_in_every_epoch(self, examples):
        before = [examples[i] for i in range(len(examples))]
        examples.on_epoch_end()
        assert len(examples) == len(before)
        for i, parts in enumerate(before):
            for values, again in zip(parts, examples[i], strict=True):
                for name in values:
                    np.testing.assert_array_equal(again[name], values[name])

    def test_no_dropout_of_user_ids(self, windows, examples):
        for i in range(len(examples)):
            ids = examples[i][0]["user_id"]
            assert np.isin(ids, windows.train.user_ids).all()


def watch_loss_oracle(labels, scores, block, level_weight):
    """One loss per row, in float64, in loops over the movies."""
    losses = []
    for row_labels, row in zip(labels, scores.astype("float64"), strict=True):
        candidates = [s for y, s in zip(row_labels, row, strict=True) if y != -1]
        watched = [s for y, s in zip(row_labels, row, strict=True) if y == 1]
        log_sum = np.log(np.sum(np.exp(candidates)))
        softmax = sum(log_sum - s for s in watched)
        level = sum(np.log1p(np.exp(s)) for s in candidates) - sum(watched)
        losses.append((softmax + level_weight * level) / block)
    return np.array(losses)


class TestWatchLoss:
    def test_by_hand(self):
        loss = WatchLoss(Settings(block=2, level_weight=0.5))
        labels = np.array([[1.0, 0.0, -1.0, 1.0]])
        scores = np.log(np.array([[1.0, 2.0, 100.0, 5.0]], "float32"))
        # Candidates have e^s = 1, 2, 5, with the sum 8.
        # softmax: log(8/1) + log(8/5) = log 12.8
        # level: log 2 - log 1 for the first, log 3 for the second, and
        #        log 6 - log 5 for the last, so log(2 * 3 * 6/5) = log 7.2
        expected = (np.log(12.8) + 0.5 * np.log(7.2)) / 2
        np.testing.assert_allclose(loss(labels, scores), expected, rtol=1e-6)

    def test_against_the_oracle(self):
        rng = np.random.default_rng(0)
        labels = rng.choice([-1.0, 0.0, 1.0], (50, 30), p=[0.3, 0.6, 0.1])
        labels[0], labels[1] = 0, 1  # nothing watched, all watched
        scores = rng.normal(0, 4, (50, 30)).astype("float32")
        loss = WatchLoss(Settings(block=3, level_weight=0.2))
        found = ops.convert_to_numpy(loss.call(labels.astype("float32"), scores))
        expected = watch_loss_oracle(labels, scores, 3, 0.2)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        weights = rng.random(50).astype("float32")
        np.testing.assert_allclose(
            loss(labels.astype("float32"), scores, weights),
            np.mean(expected * weights),
            rtol=1e-5,
        )

    def test_seen_movies_are_excluded(self):
        labels = np.array([[-1.0, 1.0, 0.0, -1.0], [0.0, -1.0, 1.0, 0.0]], "float32")
        scores = tf.Variable([[50.0, 1, 2, -50], [0, 1e4, 2, 3]])
        loss = WatchLoss(Settings())
        with tf.GradientTape() as tape:
            value = loss(labels, scores)
        gradient = tape.gradient(value, scores).numpy()
        seen = labels == -1
        assert (gradient[seen] == 0).all()
        assert (gradient[~seen] != 0).all()
        scores.assign(np.where(seen, -7, scores.numpy()))
        assert loss(labels, scores) == value


class TestUndefinedRows:
    """Rows without labels do not change losses and metrics of like and rating."""

    @pytest.fixture(scope="module")
    @classmethod
    def model(cls, windows, settings):
        popularity = np.bincount(windows.train.movies, minlength=len(windows.catalogue))
        ranker = build_ranker(
            windows.catalogue, windows.train.user_ids, popularity, settings
        )
        compile_ranker(ranker.training, settings, TASKS, steps=1)
        # Random weights, for which the scores differ.
        rng = np.random.default_rng(1)
        for variable in ranker.training.trainable_variables:
            variable.assign_add(rng.normal(0, 0.1, variable.shape))
        return ranker.training

    @pytest.fixture(scope="module")
    @classmethod
    def batch(cls, windows, settings):
        examples = Examples(
            windows.before_test,
            windows.catalogue,
            settings,
            known=windows.train.lengths,
        )
        features, labels, weights = examples[0]
        assert 0 < np.mean(weights["like"]) < 1
        return features, labels, weights

    @staticmethod
    def logs(model, batch) -> dict[str, float]:
        features, labels, weights = batch
        size = len(features["user_id"])
        return model.evaluate(
            features,
            labels,
            sample_weight=weights,
            batch_size=size,
            return_dict=True,
            verbose=0,
        )

    def test_undefined_labels_are_ignored(self, model, batch):
        features, labels, weights = batch
        expected = self.logs(model, batch)
        undefined = weights["like"] == 0
        other_labels = {
            "watch": labels["watch"],
            "like": np.where(undefined[..., None], 1 - labels["like"], labels["like"]),
            "rating": np.where(undefined[..., None], 1e3, labels["rating"]),
        }
        movies = np.where(undefined, 17, features["next_movies"])
        found = self.logs(
            model, ({**features, "next_movies": movies}, other_labels, weights)
        )
        assert found == pytest.approx(expected, abs=1e-6)

        # Defined labels are not.
        labels = {**labels, "rating": labels["rating"] + 1, "like": 1 - labels["like"]}
        found = self.logs(model, (features, labels, weights))
        for name in ("like_loss", "like_auc", "rating_loss", "rating_rmse"):
            assert abs(found[name] - expected[name]) > 1e-3

    def test_more_undefined_rows_change_nothing(self, model, batch):
        features, labels, weights = batch
        expected = self.logs(model, batch)

        def twice(values: dict) -> dict:
            return {name: np.concatenate([v, v[::-1]]) for name, v in values.items()}

        more_labels, more_weights = twice(labels), twice(weights)
        size = len(features["user_id"])
        for task in ("like", "rating"):
            more_weights[task][size:] = 0
            more_labels[task][size:] = 0
        found = self.logs(model, (twice(features), more_labels, more_weights))
        for name in ("like_loss", "like_auc", "rating_loss", "rating_rmse"):
            assert found[name] == pytest.approx(expected[name], abs=1e-6), name

    def test_losses_and_metrics_are_means_over_the_defined(self, model, batch):
        features, labels, weights = batch
        scores = model.predict(features, verbose=0)
        logs = self.logs(model, batch)
        at = weights["like"] > 0
        liked = labels["like"][at].astype("float64")
        logits = scores["like"][at].astype("float64")
        entropy = np.mean(np.log1p(np.exp(logits)) - liked * logits)
        error = np.mean((labels["rating"] - scores["rating"])[at] ** 2)
        assert logs["like_loss"] == pytest.approx(entropy, rel=1e-5)
        assert logs["rating_loss"] == pytest.approx(error, rel=1e-5)
        assert logs["rating_rmse"] == pytest.approx(error**0.5, rel=1e-5)
        watch = np.mean(watch_loss_oracle(labels["watch"], scores["watch"], 5, 0.05))
        assert logs["watch_loss"] == pytest.approx(watch, rel=1e-5)
        # The weighted sum over the tasks.
        total = watch + 0.1 * entropy + 0.1 * error
        assert logs["loss"] == pytest.approx(total, rel=1e-5)


class TestFit:
    @pytest.fixture(scope="module")
    @classmethod
    def validation(cls, windows):
        return Validation(windows.before_test, windows.validation_task)

    @pytest.fixture(scope="module")
    @classmethod
    def fit(cls, windows, settings, validation):
        eager = replace(settings, learning_rate=0.1, max_epochs=8)
        return fit_ranker(
            windows.train, windows.catalogue, eager, validation=validation, verbose=0
        )

    def test_it_learns(self, fit):
        for name in ("loss", "watch_loss", "like_loss", "rating_loss"):
            assert fit.curves[name][-1] < 0.95 * fit.curves[name][0], name

    def test_early_stopping_restores_the_best_weights(
        self, fit, windows, settings, validation
    ):
        scores = fit.curves["val_ndcg@10"]
        best = fit.epochs - 1
        assert scores[best] == max(scores)
        # Training stops after two epochs without improvement.
        assert len(scores) == min(fit.epochs + 2, 8)
        assert scores[best] != scores[-1]
        scorer = fused_scorer(fit.ranker, windows.train, windows.catalogue)
        found = rank(scorer, validation.task)["ndcg@10"]
        assert found == pytest.approx(scores[best], abs=1e-9)
        examples = Examples(
            windows.before_test,
            windows.catalogue,
            settings,
            known=windows.train.lengths,
        )
        logs = fit.ranker.training.evaluate(examples, return_dict=True, verbose=0)
        assert logs["loss"] == pytest.approx(fit.curves["val_loss"][best], rel=1e-5)
        assert logs["loss"] != pytest.approx(fit.curves["val_loss"][-1], rel=1e-3)

    def test_early_stopping_by_loss_without_watch(self, windows, settings, validation):
        found = fit_ranker(
            windows.train,
            windows.catalogue,
            replace(settings, learning_rate=0.3, max_epochs=6),
            tasks=("rating",),
            validation=validation,
            verbose=0,
        )
        losses = found.curves["val_loss"]
        assert "val_ndcg@10" not in found.curves
        assert losses[found.epochs - 1] == min(losses)
        assert len(losses) == min(found.epochs + 2, 6)

    def test_no_validation_no_stopping(self, windows, settings):
        found = fit_ranker(
            windows.train,
            windows.catalogue,
            settings,
            tasks=("like",),
            epochs=3,
            verbose=0,
        )
        assert found.epochs == len(found.curves["loss"]) == 3
        assert not any(name.startswith("val_") for name in found.curves)

    def test_all_batches_of_every_epoch_are_trained(self, windows, settings):
        """The number of examples varies between epochs, the number of batches not."""
        train, catalogue = windows.train, windows.catalogue
        popularity = np.ones(len(catalogue))
        tasks = ("like",)
        ranker = build_ranker(
            catalogue, train.user_ids, popularity, settings, tasks
        ).training
        compile_ranker(ranker, settings, tasks, steps=1)
        small = replace(settings, batch_size=2)
        examples = Examples(train, catalogue, small, tasks, seed=1)
        epochs = _Epochs(examples)
        ranker.fit(examples, epochs=4, callbacks=[epochs], verbose=0)
        assert len(set(epochs.examples)) > 1
        assert epochs.trained == [len(examples)] * 4


def test_one_step_with_and_without_xla(windows, settings):
    """Without dropout, losses and updated weights are the same."""
    plain = replace(
        settings, body="moe", num_experts=4, history_dropout=0.0, dropout=0.0
    )
    popularity = np.bincount(windows.train.movies, minlength=len(windows.catalogue))
    logs, weights = [], []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(5)
        ranker = build_ranker(
            windows.catalogue, windows.train.user_ids, popularity, plain
        )
        examples = Examples(windows.train, windows.catalogue, plain)
        model = ranker.training
        if jit_compile:
            model = ranker.without_lookups()
            examples = LookedUp(examples, ranker.lookups)
        compile_ranker(model, plain, TASKS, steps=1, jit_compile=jit_compile)
        assert model.jit_compile is jit_compile
        features, labels, sample_weight = examples[0]
        logs.append(
            model.train_on_batch(features, labels, sample_weight, return_dict=True)
        )
        weights.append([ops.convert_to_numpy(w) for w in ranker.body.weights])
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    # The total includes the load balancing loss.
    weighted = logs[1]["watch_loss"] + sum(
        weight * logs[1][f"{task}_loss"]
        for task, weight in zip(TASKS[1:], plain.task_weights, strict=True)
    )
    assert logs[1]["loss"] - weighted > 0.005
    for found, expected in zip(*weights, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_batches_of_equal_size(windows, settings):
    """The batch size is constant over epochs, and all users have examples."""
    small = replace(settings, batch_size=7)
    examples = Examples(windows.train, windows.catalogue, small, equal_batches=True)
    sizes, users = set(), set()
    for _ in range(3):
        for i in range(len(examples)):
            features, _, _ = examples[i]
            sizes.add(len(features["user_id"]))
            users.update(features["user_id"])
        examples.on_epoch_end()
    assert len(sizes) == 1
    assert set(windows.train.user_ids) <= users


class _Epochs(keras.callbacks.Callback):
    """Counts the examples and the trained batches of each epoch."""

    def __init__(self, examples):
        super().__init__()
        self._examples = examples
        self.examples, self.trained = [], []

    def on_epoch_begin(self, epoch, logs=None):
        batches = [self._examples[i] for i in range(len(self._examples))]
        sizes = [len(features["user_id"]) for features, _, _ in batches]
        assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
        self.examples.append(sum(sizes))
        self.trained.append(0)

    def on_train_batch_end(self, batch, logs=None):
        self.trained[-1] += 1


def test_fuse_adds_log_probabilities():
    # P = 1/2 and 3/4: logits 0 and log 3.
    scores = {"watch": np.zeros((1, 1)), "like": np.log([[3.0]]), "rating": [[9.0]]}
    np.testing.assert_allclose(fuse(scores), [[np.log(1 / 2 * 3 / 4)]])
    del scores["like"]
    np.testing.assert_allclose(fuse(scores), [[np.log(1 / 2)]])
