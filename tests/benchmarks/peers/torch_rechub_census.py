"""torch-rechub's MMOE on the Census-Income rows, in the loop of its trainer.

Batches are cut from arrays, which is faster than its `DataGenerator`, which reads rows
one by one.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.multi_task import MMOE
from torch_rechub.trainers import MTLTrainer

from tests.benchmarks.census_rows import TASKS, Rows, Sizes, aucs, load
from tests.benchmarks.workload import Workload


def make(path: str, epochs: int) -> Workload:
    """Return training and test.

    Args:
        path: file of `census_rows.prepare`.
        epochs: how often to train on all rows.
    """
    rows, sizes = load(path), Sizes()
    x, y = _tensors(rows.train)
    test, _ = _tensors(rows.test)
    types = ["classification"] * len(TASKS)

    def build() -> torch.nn.Module:
        # New features for each model: they keep their embeddings.
        features = [
            SparseFeature(name, count, embed_dim=sizes.embedding)
            for name, count in rows.ids.items()
        ]
        features += [DenseFeature(name) for name in rows.numbers]
        expert = {"dims": list(sizes.expert_units), "activation": "relu"}
        towers = [{"dims": list(sizes.tower_units), "activation": "relu"}] * len(TASKS)
        return MMOE(features, types, sizes.experts, expert, towers)

    def measure(number: int) -> dict[str, float]:
        torch.manual_seed(number)
        model = build()
        options = {"lr": 1e-3, "weight_decay": 1e-5}  # The trainer's default decay.
        trainer = MTLTrainer(model, types, optimizer_params=options)
        started = time.perf_counter()
        for _ in range(epochs):
            batches = torch.randperm(len(y)).split(sizes.rows)
            trainer.train_one_epoch(
                [({name: c[i] for name, c in x.items()}, y[i]) for i in batches]
            )
        seconds = time.perf_counter() - started
        model.eval()
        with torch.inference_mode():
            found = model(test).numpy()
        scores = dict(zip(TASKS, found.T, strict=True))
        return {"seconds": seconds, **aucs(rows.test, scores)}

    return Workload(
        measure=measure,
        parameters=sum(weight.numel() for weight in build().parameters()),
        packages=("torch-rechub", "torch"),
    )


def _tensors(rows: Rows) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    x = {name: torch.from_numpy(column[:, 0]) for name, column in rows.columns.items()}
    labels = np.concatenate([rows.labels[task] for task in TASKS], axis=1)
    return x, torch.from_numpy(labels)
