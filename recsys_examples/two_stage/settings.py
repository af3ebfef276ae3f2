"""What the two stages are made of. Read before TensorFlow is loaded."""

from __future__ import annotations

from dataclasses import dataclass

STACKS = ("keras-rs", "tfrs")
RANKERS = ("mmoe", "ple")
TASKS = ("watch", "like", "rating")
LIST_LENGTH = 10


@dataclass(frozen=True)
class Settings:
    """Sizes and rates of the pipeline.

    Attributes:
        stack: what trains the two towers and finds the candidates, one of `STACKS`.
        ranker: what mixes the experts of the ranker, one of `RANKERS`.
        candidates: movies that the first stage hands to the second.
        retrieval_epochs: passes of the two towers over the data at most.
        late: share of each user's training ratings, the latest, that the first
            ranker learns from.
        block: movies watched next that one example of the ranker asks for.
        fewest_ratings: that a movie needs to be in the index.
        related: movies that are kept for each as following it, and as like it.
        num_experts: experts that all tasks share.
        units: width of an expert.
        dropout: share of the user's features that is dropped.
        batch_size: of the ranker, in moments, each with all its candidates.
        learning_rate: of the ranker's Adam, falling by a cosine.
        ranker_epochs: passes of the ranker at most.
        task_weights: weights of the like and the rating loss; watch has 1.
        like_weights: weights of log like to choose from in the fusion; watch has 1.
        rating_weights: weights of the stars to choose from.
        diversities: weights of similarity in the list to choose from.
        tolerance: share of the validation NDCG@10 that diversity may cost.
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
