"""A step of a layer in PyTorch, as `layer_steps` has it for Keras."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.layer_work import LayerSizes, facts
from tests.benchmarks.workload import Workload, repeated


def workload(
    module: torch.nn.Module,
    call: Callable[[Any], tuple[Any, Any]],
    x: Any,
    step: str,
    *,
    package: str,
    sizes: LayerSizes,
    kind: str,
    note: str,
) -> Workload:
    """Return a step of a layer.

    Args:
        module: the layer.
        call: function of the inputs that returns outputs and auxiliary loss.
        x: NumPy array, the inputs.
        step: "training" (the gradients of the inputs and of all parameters) or
            "forward" (the output in inference).
        package: name of the library's package.
        sizes: the sizes.
        kind: "MLP" or "GLU".
        note: how the layer differs from the others.
    """
    rows = torch.from_numpy(x)
    outputs = _forward(module, call, rows)().numpy()
    make = {"training": _training, "forward": _forward}[step]
    return Workload(
        run=repeated(make(module, call, rows)),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        packages=(package, "torch"),
        facts=facts(sizes, kind, outputs, note),
    )


def _training(module: torch.nn.Module, call: Any, x: torch.Tensor) -> Any:
    module.train()

    def step() -> None:
        rows = x.detach().requires_grad_()
        outputs, auxiliary = call(rows)
        (outputs.square().sum() + auxiliary).backward()
        # Kept gradients would count as memory from before the step.
        module.zero_grad(set_to_none=True)

    return step


def _forward(module: torch.nn.Module, call: Any, x: torch.Tensor) -> Any:
    module.eval()

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return call(x)[0]

    return step
