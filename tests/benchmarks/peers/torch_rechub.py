"""torch-rechub's MMOE and PLE, in the loop of its own trainer.

Its MLPs normalise each layer by batch, also the gates before their softmax. With
`published=False` these modules are taken out, so that all models do the same work, and
the optimizer is Adam without the trainer's default weight decay.
"""

from __future__ import annotations

import numpy as np
import torch
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.multi_task import MMOE, PLE
from torch_rechub.trainers import MTLTrainer

from tests.benchmarks.click_rows import TASKS, Sizes, draw
from tests.benchmarks.mixture_sizes import ple_sizes
from tests.benchmarks.workload import Workload


def make(model: str, experts: int, step: str, published: bool = False) -> Workload:
    """Return the training or serving step of a model.

    Args:
        model: "MMoE" or "PLE".
        experts: number of experts, for PLE of each level.
        step: "training" (a batch of `MTLTrainer.train_one_epoch`) or "serving".
        published: whether to keep the batch normalization and the weight decay.
    """
    torch.manual_seed(0)
    sizes = Sizes()
    columns, labels = draw(sizes)
    x = {name: torch.from_numpy(column[:, 0]) for name, column in columns.items()}
    y = torch.from_numpy(np.concatenate([labels[task] for task in TASKS], axis=1))
    built = build(model, experts, sizes)
    if not published:
        remove_normalization(built)
    if step == "training":
        types = ["classification"] * len(TASKS)
        decay = 1e-5 if published else 0.0
        options = {"lr": 1e-3, "weight_decay": decay}
        trainer = MTLTrainer(built, types, optimizer_params=options)

        def run(steps: int) -> None:
            trainer.train_one_epoch([(x, y)] * steps)
            # Kept gradients would count as memory from before the next step.
            trainer.optimizer.zero_grad()

    else:
        built.eval()

        def run(steps: int) -> None:
            with torch.inference_mode():
                for _ in range(steps):
                    built(x)

    return Workload(
        run=run,
        parameters=sum(weight.numel() for weight in built.parameters()),
        packages=("torch-rechub", "torch"),
    )


def build(model: str, experts: int, sizes: Sizes) -> torch.nn.Module:
    """Return the model."""
    features = [
        SparseFeature(name, sizes.ids, embed_dim=sizes.embedding)
        for name in sizes.id_names
    ]
    features += [DenseFeature(name) for name in sizes.number_names]
    return mixture(model, experts, features, sizes.expert_units, sizes.tower_units)


def mixture(
    model: str,
    experts: int,
    features: list,
    expert_units: tuple[int, ...],
    tower_units: tuple[int, ...],
) -> torch.nn.Module:
    """Return a model on any features."""
    types = ["classification"] * len(TASKS)
    expert = {"dims": list(expert_units), "activation": "relu"}
    towers = [{"dims": list(tower_units), "activation": "relu"} for _ in TASKS]
    if model == "MMoE":
        return MMOE(features, types, experts, expert, towers)
    numbers = ple_sizes(experts)
    return PLE(
        features,
        types,
        n_level=numbers["num_levels"],
        n_expert_specific=numbers["num_task_experts"],
        n_expert_shared=numbers["num_shared_experts"],
        expert_params=expert,
        tower_params_list=towers,
    )


def remove_normalization(model: torch.nn.Module) -> None:
    """Replace each batch normalization by the identity."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.BatchNorm1d):
                setattr(module, name, torch.nn.Identity())
