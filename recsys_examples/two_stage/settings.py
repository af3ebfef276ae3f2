"""The settings of the pipeline; importing them does not load TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass

STACKS = ("keras-rs", "tfrs")
RANKERS = ("mmoe", "ple")
TASKS = ("watch", "like", "rating")
LIST_LENGTH = 10


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of the pipeline.

    Attributes:
        stack: library that trains the two towers and retrieves, one of `STACKS`.
        ranker: multi-task layer of the ranker, one of `RANKERS`.
        candidates: number of movies that the first stage retrieves.
        retrieval_epochs: maximal number of epochs of the two towers.
        late: fraction of each user's training ratings, the latest, that the first
            ranker is trained on.
        block: number of next movies per training example of the ranker.
        fewest_ratings: minimal number of ratings of a movie in the index.
        related: number of following and of similar movies kept per movie.
        num_experts: number of experts of the MMoE.
        units: width of an expert.
        dropout: dropout rate of the user features.
        batch_size: examples per batch of the ranker, each with all its candidates.
        learning_rate: initial learning rate of the ranker's Adam, with cosine decay.
        ranker_epochs: maximal number of epochs of the ranker.
        task_weights: loss weights of like and rating; that of watch is 1.
        like_weights: values of the fusion weight of log p(like) to try.
        rating_weights: values of the fusion weight of the stars to try.
        diversities: values of the diversity weight to try.
        tolerance: maximal relative loss of validation NDCG@10 through diversity.
    """

    stack: str = "keras-rs"
    ranker: str = "mmoe"
    candidates: int = 200
    retrieval_epochs: int = 4
    late: float = 0.2
    block: int = 10
    fewest_ratings: int = 3
    related: int = 30
    num_experts: int = 3
    units: int = 16
    dropout: float = 0.1
    batch_size: int = 32
    learning_rate: float = 5e-3
    ranker_epochs: int = 10
    task_weights: tuple[float, float] = (0.3, 0.1)
    like_weights: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 1.5)
    rating_weights: tuple[float, ...] = (0.0, 0.2, 0.5)
    diversities: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2)
    tolerance: float = 0.005
