"""Binary tasks of given correlation, label scarcity, and differing scenarios.

Axis letters: n rows, d features, t tasks, m scenarios.

This is the synthetic data of MMoE (Ma et al. 2018, section 3.2), with t binary tasks
and with scenarios. Task k has in scenario s the unit weight vector

    w_ks = sqrt(1 - f^2) w_k + f v_ks,  f the scenario difference,

and its label is 1 with probability sigmoid(a_k + signal * curve(c w_ks x)), where the
curve, z plus sines of z, is scaled to mean 0 and variance 1. All w_k and v_ks are unit
vectors. Those of one scenario have pairwise cosine p, the correlation; those of
different scenarios, and w and v, are orthogonal. Hence

    cos(w_ks, w_ls) = p,                  two tasks in a scenario,
    cos(w_ks, w_kr) = 1 - f^2,            a task in two scenarios.

Tasks conflict where p is low or negative: the papers expect mixtures of experts to gain
over a shared bottom there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recsys_examples.click_conversion.data import Dataset, Part, split_part
from recsys_examples.task_correlation.data import curve


@dataclass(frozen=True)
class Tasks:
    """Settings of the simulated tasks.

    Args:
        rows: number of rows.
        features: d, at least `tasks * (1 + scenarios)`, or `tasks` without differing
            scenarios.
        tasks: t >= 2.
        correlation: p in [-1 / (t - 1), 1], cosine of the weight vectors of two tasks.
            No more than t vectors can have pairwise a lower one.
        sines: number of sines in the curve; 0 for linear tasks.
        scale: c > 0, scale of the weights: larger makes the sines harder to fit.
        signal: > 0, standard deviation of the logits.
        rate: in (0, 1), mean of the probabilities of each task.
        label_share: in (0, 1], share of the rows with a label of the first task.
        imbalance: in (0, 1], ratio of the last task's labels to the first's; between
            them the shares are geometric. Labels are missing at random.
        scenarios: m >= 1, equally frequent.
        scenario_difference: f in [0, 1], above.

    Raises:
        ValueError: if a setting is out of range.
    """

    rows: int = 50_000
    features: int = 64
    tasks: int = 2
    correlation: float = 0.5
    sines: int = 4
    scale: float = 1.0
    signal: float = 2.0
    rate: float = 0.3
    label_share: float = 1.0
    imbalance: float = 1.0
    scenarios: int = 1
    scenario_difference: float = 0.0

    def __post_init__(self) -> None:
        for name, lowest in (("rows", 3), ("tasks", 2), ("sines", 0), ("scenarios", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(
                    f"{name} must be at least {lowest}; got {getattr(self, name)}"
                )
        for name in ("scale", "signal"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0; got {getattr(self, name)}")
        for name in ("label_share", "imbalance"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1]; got {getattr(self, name)}")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must be in (0, 1); got {self.rate}")
        if not 0 <= self.scenario_difference <= 1:
            raise ValueError(
                f"scenario_difference must be in [0, 1]; got {self.scenario_difference}"
            )
        if not -1 / (self.tasks - 1) <= self.correlation <= 1:
            raise ValueError(
                f"correlation must be in [-1 / (tasks - 1), 1] with tasks="
                f"{self.tasks}; got {self.correlation}"
            )
        if self.features < self._directions:
            raise ValueError(
                f"features must be at least {self._directions} for {self.tasks} tasks "
                f"and {self.scenarios} scenarios; got {self.features}"
            )

    @property
    def _directions(self) -> int:
        return self.tasks * (1 + self.scenarios * (self.scenario_difference > 0))

    @property
    def names(self) -> list[str]:
        """The tasks."""
        return [f"task_{k}" for k in range(self.tasks)]

    @property
    def label_shares(self) -> np.ndarray:
        """Share of the rows with a label, (t,)."""
        steps = np.arange(self.tasks) / (self.tasks - 1)
        return self.label_share * self.imbalance**steps


def simulate_tasks(settings: Tasks, seed: int = 0) -> Dataset:
    """Sample tasks and split their rows at random; see `sample_tasks`.

    Example:

    >>> data = simulate_tasks(Tasks(rows=1000, correlation=-1.0, imbalance=0.1))
    >>> list(data.train.labels), len(data.train)
    (['task_0', 'task_1'], 600)
    """
    return split_part(
        sample_tasks(settings, seed),
        seed,
        name=f"simulated tasks (correlation {settings.correlation:g})",
        vocabulary={"scenario": 1 + settings.scenarios},
        scenarios=settings.scenarios,
    )


def sample_tasks(settings: Tasks, seed: int = 0) -> Part:
    """Sample tasks and rows.

    Args:
        settings: the settings.
        seed: seed of all draws. Features, scenarios and the random numbers behind the
            labels do not depend on correlation, shares and scenario difference: runs
            with the same seed can be paired.

    Returns:
        n rows with the numbers `x0`, `x1`, ... (standard normal) and the category
        `scenario` (from 1), labels `task_0`, `task_1`, ... (0 or 1, NaN if missing),
        the row number as group, and the label probabilities, under the names of the
        tasks, as truth.
    """
    rng_weights, rng_rows, rng_labels = np.random.default_rng(seed).spawn(3)
    vectors = weights(settings, rng_weights)
    n, t = settings.rows, settings.tasks
    x = rng_rows.standard_normal((n, settings.features), np.float32)
    scenario = rng_rows.integers(settings.scenarios, size=n, dtype=np.int32)
    uniform = rng_labels.random((2, t, n))

    labels, truth = {}, {}
    for k, name in enumerate(settings.names):
        projection = np.zeros(n)
        for s in range(settings.scenarios):
            rows = scenario == s
            projection[rows] = x[rows] @ vectors[s, k]
        logit = curve(settings.scale * projection, settings.sines)
        logit = settings.signal * (logit - logit.mean()) / logit.std()
        truth[name] = _probabilities(logit, settings.rate)
        positive = uniform[0, k] < truth[name]
        known = uniform[1, k] < settings.label_shares[k]
        labels[name] = np.where(known, positive, np.nan).astype(np.float32)
    features = {f"x{i}": x[:, i] for i in range(settings.features)}
    return Part(
        features | {"scenario": scenario + np.int32(1)},
        labels,
        np.arange(n),
        scenario,
        truth,
    )


def weights(settings: Tasks, rng: np.random.Generator) -> np.ndarray:
    """Return the unit weight vectors (m, t, d)."""
    t, f = settings.tasks, settings.scenario_difference
    # Row by row, so that w_k does not depend on the number of other directions.
    normal = rng.normal(size=(settings._directions, settings.features))
    basis = np.linalg.qr(normal.T)[0].T.reshape(-1, t, settings.features)
    # The rows of the root times an orthonormal basis have the Gram matrix of cosines.
    cosines = np.full((t, t), settings.correlation) + np.diag(
        np.full(t, 1 - settings.correlation)
    )
    values, vectors = np.linalg.eigh(cosines)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    correlated = root @ basis
    if len(correlated) == 1:
        return np.repeat(correlated, settings.scenarios, axis=0)
    return np.sqrt(1 - f**2) * correlated[:1] + f * correlated[1:]


def _probabilities(logits: np.ndarray, rate: float) -> np.ndarray:
    """Return probabilities of mean `rate`, by bisection of the intercept."""
    low, high = -30.0 - logits.max(), 30.0 - logits.min()
    for _ in range(40):
        middle = (low + high) / 2
        probabilities = 1 / (1 + np.exp(-(logits + middle)))
        low, high = (middle, high) if probabilities.mean() < rate else (low, middle)
    return probabilities
