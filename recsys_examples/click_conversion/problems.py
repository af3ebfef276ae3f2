"""What is learned and how it is judged: a chain of two events, or separate tasks.

Axis letters: n rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_moe import metrics
from keras_moe.multitask import Task
from recsys_examples.click_conversion.data import Part, joint_label
from recsys_examples.click_conversion.settings import MODELS, NAIVE
from recsys_examples.click_conversion.simulator import COUNTERFACTUAL, P_CONVERSION

Outputs = Mapping[str, np.ndarray]  # by name, (n, o)
Sums = dict[str, tuple[float, float]]  # by loss: the sum over rows, their weight
_LEAST = 1e-7  # of a probability and its complement, in validation losses


class Meters:
    """Metrics of `keras_moe.metrics`, updated batch by batch.

    Args:
        meters: maps the name of a value to a metric.
    """

    def __init__(self, meters: dict[str, keras.metrics.Metric]) -> None:
        self._meters = meters

    def update(
        self,
        name: str,
        labels: np.ndarray,
        predicted: np.ndarray,
        rows: Any = slice(None),
        **groups: Any,
    ) -> None:
        """Count the given rows in a metric, if there are any."""
        labels, predicted = labels[rows], predicted[rows]
        if len(labels):
            groups = {key: value[rows] for key, value in groups.items()}
            self._meters[name].update_state(labels, predicted, **groups)

    def results(self) -> dict[str, float]:
        """Return the values; those that are not defined (NaN) are left out."""
        found = {name: float(meter.result()) for name, meter in self._meters.items()}
        return {name: value for name, value in found.items() if np.isfinite(value)}


@dataclass(frozen=True)
class Chain:
    """Two events, of which the second needs the first.

    Attributes:
        first: label of the first event, 0 or 1.
        second: label of the second event: 0 or 1, NaN where the first did not occur.
        words: what tables call the two events.
        known_truth: whether rows have the truth of `simulator.sample_impressions`.
        by_scenario: whether to judge the ranking within scenarios.
    """

    first: str = "click"
    second: str = "conversion"
    words: tuple[str, str] = ("click", "CVR")
    known_truth: bool = False
    by_scenario: bool = False

    @property
    def models(self) -> tuple[str, ...]:
        """The models that can learn it, of `settings.MODELS`."""
        return MODELS

    @property
    def metrics(self) -> dict[str, str]:
        """The metrics of test rows and their labels in tables."""
        first, second = self.words
        both = f"{first} and {second}"
        found: dict[str, str] = {}
        if self.known_truth:
            found |= {
                "rate_auc_all": f"{second}, all rows: AUC",
                "rate_ece_all": f"{second}, all rows: calibration error (ECE)",
                "rate_excess_all": f"{second}, all rows: excess log loss",
                "rate_pcoc_all": f"{second}, all rows: predicted / true",
            }
        found |= {
            "first_auc": f"{first}: AUC",
            "rate_auc": f"{second} where {first}: AUC",
            "rate_ece": f"{second} where {first}: ECE",
            "joint_auc": f"{both}: AUC",
            "joint_ne": f"{both}: normalised entropy",
            "joint_pcoc": f"{both}: predicted / observed",
        }
        if self.by_scenario:
            found["joint_gauc"] = f"{both}: AUC within scenarios"
        return found

    @property
    def joint(self) -> str:
        """The output of both events."""
        return f"{self.first}_and_{self.second}"

    def labels(self, part: Part) -> dict[str, np.ndarray]:
        """Return the labels for training."""
        return {name: part.labels[name] for name in (self.first, self.second)}

    def losses(self, part: Part, outputs: Outputs) -> Sums:
        """Return the negative log-likelihood of what was observed on each row."""
        clicked = part.labels[self.first] == 1
        first = log_loss(part.labels[self.first], outputs[self.first][:, 0])
        rate = log_loss(
            part.labels[self.second][clicked], outputs[self.second][clicked, 0]
        )
        return {"chain": (float(first.sum() + rate.sum()), len(part))}

    def meters(self) -> Meters:
        """Return new metrics for `measure`."""
        meters = {
            "first_auc": metrics.RankAUC(),
            "rate_auc": metrics.RankAUC(),
            "rate_ece": metrics.ExpectedCalibrationError(),
            "joint_auc": metrics.RankAUC(),
            "joint_ne": metrics.NormalizedEntropy(),
            "joint_pcoc": metrics.PCOC(),
        }
        if self.by_scenario:
            meters["joint_gauc"] = metrics.GAUC()
        if self.known_truth:
            meters |= {
                "rate_auc_all": metrics.RankAUC(),
                "rate_ece_all": metrics.ExpectedCalibrationError(),
                "rate_excess_all": keras.metrics.Mean(),
                "rate_pcoc_all": metrics.PCOC(),
            }
        return Meters(meters)

    def measure(self, meters: Meters, part: Part, outputs: Outputs) -> None:
        """Update the meters with rows."""
        clicks, rate = part.labels[self.first], outputs[self.second][:, 0]
        conversions, clicked = part.labels[self.second], clicks == 1
        both = joint_label(part.labels, self.first, self.second)
        meters.update("first_auc", clicks, outputs[self.first][:, 0])
        for name in ("rate_auc", "rate_ece"):
            meters.update(name, conversions, rate, clicked)
        for name in ("joint_auc", "joint_ne", "joint_pcoc"):
            meters.update(name, both, outputs[self.joint][:, 0])
        if self.by_scenario:
            predicted = outputs[self.joint][:, 0]
            meters.update("joint_gauc", both, predicted, groups=part.scenario)
        if self.known_truth:
            truth = part.truth[P_CONVERSION]
            meters.update("rate_auc_all", part.truth[COUNTERFACTUAL], rate)
            meters.update("rate_ece_all", truth, rate)
            meters.update("rate_pcoc_all", truth, rate)
            excess = log_loss(truth, rate) - log_loss(truth, truth)
            meters.update("rate_excess_all", excess, np.ones_like(excess))


@dataclass(frozen=True)
class Goal:
    """A task of `Separate`.

    Attributes:
        name: its label, NaN where it is not known.
        head: "binary", "regression" or "ziln".
        defined: the label that is above 0 on rows where the task is defined; None: the
            rows where its own label is known.
    """

    name: str
    head: str = "binary"
    defined: str | None = None

    def task(self) -> Task:
        """Return the declaration for a `MultiTaskModel`."""
        return Task(
            self.name,
            self.head,
            defined=self.defined,
            skip_missing=self.defined is None,
        )


_METRICS: dict[str, dict[str, tuple[str, type[keras.metrics.Metric]]]] = {
    "binary": {
        "auc": ("AUC", metrics.RankAUC),
        "ne": ("normalised entropy", metrics.NormalizedEntropy),
    },
    "regression": {
        "rmse": ("RMSE, in standard deviations", keras.metrics.RootMeanSquaredError)
    },
    "ziln": {
        "xauc": ("pairs in order (XAUC)", metrics.XAUC),
        "pcoc": ("predicted / observed", metrics.PCOC),
    },
}


@dataclass(frozen=True)
class Separate:
    """Tasks without a chain of probabilities.

    Attributes:
        goals: the tasks.
        known_truth: whether rows have the probability of each label as truth.
    """

    goals: tuple[Goal, ...]
    known_truth: bool = False

    @property
    def models(self) -> tuple[str, ...]:
        """The models that can learn them, of `settings.MODELS`."""
        return NAIVE

    @property
    def metrics(self) -> dict[str, str]:
        """The metrics of test rows and their labels in tables."""
        found = {
            f"{goal.name}_{key}": f"{goal.name}: {label}"
            for goal in self.goals
            for key, (label, _) in _METRICS[goal.head].items()
        }
        if self.known_truth:
            found |= {f"{g.name}_excess": f"{g.name}: excess" for g in self.goals}
        return found

    def labels(self, part: Part) -> dict[str, np.ndarray]:
        """Return the labels for training."""
        return {goal.name: part.labels[goal.name] for goal in self.goals}

    def losses(self, part: Part, outputs: Outputs) -> Sums:
        """Return the losses of the tasks' heads."""
        found: Sums = {}
        for goal in self.goals:
            labels = part.labels[goal.name]
            known = np.isfinite(labels)
            count = int(known.sum())
            loss = goal.task().head.loss()
            total = (
                count * float(loss(labels[known], outputs[goal.name][known]))
                if count
                else 0.0
            )
            found[goal.name] = (total, count)
        return found

    def meters(self) -> Meters:
        """Return new metrics for `measure`."""
        meters = {
            f"{goal.name}_{key}": metric()
            for goal in self.goals
            for key, (_, metric) in _METRICS[goal.head].items()
        }
        if self.known_truth:
            meters |= {f"{g.name}_excess": keras.metrics.Mean() for g in self.goals}
        return Meters(meters)

    def measure(self, meters: Meters, part: Part, outputs: Outputs) -> None:
        """Update the meters with rows."""
        for goal in self.goals:
            labels = part.labels[goal.name]
            known = np.isfinite(labels)
            head = goal.task().head
            predicted = np.asarray(head.prediction(outputs[goal.name]))[:, 0]
            for key in _METRICS[goal.head]:
                meters.update(f"{goal.name}_{key}", labels, predicted, known)
            if self.known_truth:
                truth = part.truth[goal.name]
                excess = log_loss(truth, predicted) - log_loss(truth, truth)
                meters.update(f"{goal.name}_excess", excess, np.ones_like(excess))


Problem = Chain | Separate


def log_loss(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the log loss of each row; labels may be probabilities."""
    predicted = np.clip(predicted.astype(np.float64), _LEAST, 1 - _LEAST)
    return -(labels * np.log(predicted) + (1 - labels) * np.log1p(-predicted))


def total_loss(sums: list[Sums]) -> float:
    """Return the sum over the losses of their means over the rows of all batches."""
    total = 0.0
    for name in sums[0]:
        weight = sum(batch[name][1] for batch in sums)
        if weight:
            total += sum(batch[name][0] for batch in sums) / weight
    return total
