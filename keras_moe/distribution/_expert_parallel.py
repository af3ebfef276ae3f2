"""Expert parallelism: a `LayoutMap` that splits experts and tables over a mesh axis."""

from __future__ import annotations

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import keras
from keras.src.utils.naming import to_snake_case  # Keras does not export it.

from keras_moe import _backend, _checks
from keras_moe.distribution._placements import (
    Axis,
    VariablePlacement,
    division,
    has_experts,
    layers_with_experts,
    placements_of,
)
from keras_moe.experts import StackedKernels


class ExpertParallel(keras.distribution.ModelParallel):
    """A `keras.distribution.ModelParallel` that says where every variable is.

    Made by `expert_parallel`.

    Args:
        layout_map: `keras.distribution.LayoutMap`.
        batch_dim_name: name of the mesh axis over which batches are split.
        placements: list of `VariablePlacement`, one per variable.
        notes: list of lines on what routers see of a batch.
        **kwargs: further arguments of `ModelParallel`.

    Attributes:
        placements: list of `VariablePlacement`, one per variable.
        notes: list of str, what the routers of the model see of a batch.

    Example:

    >>> keras_moe.distribution.VariablePlacement("a/kernel", (4, 2), (None, None), "")
    VariablePlacement(path='a/kernel', shape=(4, 2), axes=(None, None), reason='')
    """

    def __init__(
        self,
        *,
        layout_map: Any = None,
        batch_dim_name: str | None = None,
        placements: list[VariablePlacement] | None = None,
        notes: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(layout_map=layout_map, batch_dim_name=batch_dim_name, **kwargs)
        self.placements = placements or []
        self.notes = notes or []

    def summary(self) -> str:
        """Return a line per variable, and `notes`."""
        lines = [
            f"{place.path} {place.shape} "
            f"{'split' if any(place.axes) else 'replicated'}: {place.reason}"
            for place in self.placements
        ]
        return "\n".join([*lines, *self.notes])


def expert_parallel(
    model: Any,
    mesh: Any,
    *,
    expert_axis: str = "expert",
    batch_axis: str | None = None,
    table_axis: str | None = None,
    embeddings: bool = True,
    batch_size: int | None = None,
    auto_shard_dataset: bool = True,
) -> ExpertParallel:
    """Return a distribution that splits experts and tables over the axis of a mesh.

    Stacked experts are split along their first axis over `expert_axis`, tables of
    `keras.layers.Embedding` along their rows over `table_axis`; all else is replicated.
    So are the experts of layers without a router (`PLE`, `SoftMoE`) if the axis does
    not divide them, with a warning.
    Optimizer slots follow their variables. Batches are split over `batch_axis`. If this
    is also the axis of the experts, every device has a part of both.

    The result describes variables by their paths, up to the numbers that Keras appends
    to default names. Make or load the model once more in its scope::

        distribution = keras_moe.distribution.expert_parallel(
            build(), {"batch": 2, "expert": 4}
        )
        print(distribution.summary())
        with distribution.scope():
            model = build()  # or keras.models.load_model(...)
            model.compile("adam", "mse")
            model.fit(dataset)

    Losses, gradients, metrics and the state of routers are those of the whole batch,
    with one exception: under `dispatch="capacity"` a token competes for slots with the
    tokens of its part of the batch, and the capacity is computed from the size of that
    part (`notes` says so). Expert choice and Sinkhorn routing compete over the whole
    batch. Dropout draws other numbers than on one device.

    Args:
        model: a built Keras model or layer.
        mesh: a `keras.distribution.DeviceMesh`, or a dict from axis names to sizes, in
            the order of the axes, such as `{"batch": 2, "expert": 4}`.
        expert_axis: name of the mesh axis over which experts are split.
        batch_axis: name of the mesh axis over which batches are split. Default: "batch"
            if the mesh has it, else its first axis.
        table_axis: name of the mesh axis over which tables are split. Default:
            `expert_axis`.
        embeddings: bool, whether tables are split.
        batch_size: int, the size of a global batch, to be checked. Not checked by
            default; Keras fails in `fit` if the axis does not divide it.
        auto_shard_dataset: bool, whether Keras gives each process its part of a
            `tf.data.Dataset`.

    Returns:
        An `ExpertParallel`, to be used as any `keras.distribution.Distribution`.

    Raises:
        ValueError: if the backend is not JAX, the model is not built or has experts
            that cannot be split, there are too few devices, an axis is unknown, or an
            axis does not divide the experts of a layer with a router or the batch; or
            if default names cannot tell a variable that is split from one that is not.

    References:
        - [Lepikhin et al., 2020: GShard: Scaling Giant Models with Conditional
          Computation and Automatic Sharding](https://arxiv.org/abs/2006.16668)
    """
    if _backend.name() != "jax":
        raise ValueError(
            "`expert_parallel` needs the JAX backend (KERAS_BACKEND=jax); on "
            "TensorFlow use tf.distribute.MirroredStrategy, where every device has all "
            "experts. "
            f"Received: keras.backend.backend()={_backend.name()!r}"
        )
    if not getattr(model, "built", False):
        raise ValueError(
            "`model` must be built: call it once, or `model.build(input_shape)`. "
            f"Received: model={model!r}"
        )
    mesh = _checked_mesh(mesh)
    sizes = dict(zip(mesh.axis_names, mesh.shape, strict=True))
    if batch_axis is None:
        batch_axis = "batch" if "batch" in sizes else mesh.axis_names[0]
    table_axis = expert_axis if table_axis is None else table_axis
    for argument, axis in {
        "expert_axis": expert_axis,
        "batch_axis": batch_axis,
        "table_axis": table_axis,
    }.items():
        if not isinstance(axis, str) or axis not in sizes:
            raise ValueError(
                f"`{argument}` must be an axis of `mesh`, one of {list(sizes)}: pass "
                f"`{argument}` or name an axis so. Received: {argument}={axis!r}"
            )
    if batch_size is not None:
        _checks.positive_int("batch_size", batch_size)
        if batch_size % sizes[batch_axis]:
            raise ValueError(
                f"`batch_size` must be a multiple of the size of the axis "
                f"{batch_axis!r}: drop the remainder or pad it with sample weight 0. "
                f"Received: batch_size={batch_size}, mesh={sizes}"
            )
    embeddings = _checks.flag("embeddings", embeddings)
    auto_shard_dataset = _checks.flag("auto_shard_dataset", auto_shard_dataset)
    table = (table_axis, sizes[table_axis]) if embeddings else None
    axis = expert_axis, sizes[expert_axis]
    for layer in layers_with_experts(model):
        _check_experts(layer, axis)
    placements = list(placements_of(model, axis, table))
    _warn_of_replicated(model, placements, axis)
    layout_map = keras.distribution.LayoutMap(mesh)
    for pattern, axes in _patterns(placements, model).items():
        layout_map[pattern] = axes
    return ExpertParallel(
        layout_map=layout_map,
        batch_dim_name=batch_axis,
        placements=placements,
        notes=list(_notes(model, batch_axis, sizes[batch_axis])),
        auto_shard_dataset=auto_shard_dataset,
    )


def _checked_mesh(mesh: Any) -> Any:
    """Return a `DeviceMesh`, made of the first devices if `mesh` is a dict of sizes."""
    if isinstance(mesh, keras.distribution.DeviceMesh):
        return mesh
    named = isinstance(mesh, Mapping) and all(isinstance(axis, str) for axis in mesh)
    if not named or not mesh:
        raise ValueError(
            "`mesh` must be a keras.distribution.DeviceMesh or a dict from names to "
            f"sizes, such as {{'batch': 2, 'expert': 4}}. Received: mesh={mesh!r}"
        )
    shape = tuple(_checks.positive_int(f"mesh[{a!r}]", n) for a, n in mesh.items())
    devices = keras.distribution.list_devices()
    if math.prod(shape) > len(devices):
        raise ValueError(
            f"`mesh` must not have more devices than there are, {len(devices)}; on a "
            "CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight. "
            f"Received: mesh={dict(mesh)}"
        )
    return keras.distribution.DeviceMesh(shape, list(mesh), devices[: math.prod(shape)])


def _check_experts(layer: Any, axis: Axis) -> None:
    """Raise ValueError if the experts of a routed layer cannot be split."""
    experts = layer.experts
    if not isinstance(experts, StackedKernels):
        raise ValueError(
            f"`model` has the layer {layer.name!r} whose experts are separate layers "
            "and cannot be split: use MLPExperts or GLUExperts, or "
            "keras.distribution.DataParallel. "
            f"Received: experts={type(experts).__name__}"
        )
    if experts.num_experts % axis[1]:
        raise ValueError(
            f"`mesh` must have an axis {axis[0]!r} whose size divides the number of "
            f"experts of the layer {layer.name!r}: {_divisors(experts.num_experts)}. "
            f"Received: {axis[0]}={axis[1]} for num_experts={experts.num_experts}"
        )


def _divisors(count: int) -> list[int]:
    return [size for size in range(1, count + 1) if count % size == 0]


def _warn_of_replicated(
    model: Any, placements: list[VariablePlacement], axis: Axis
) -> None:
    """Warn of experts that the axis does not divide, such as those of a `PLE`."""
    whole = {
        variable.path: division(layer.num_experts, "experts", axis)
        for layer in model._flatten_layers(include_self=True)
        if has_experts(layer)
        for variable in layer.weights
    }
    # Shared experts are whole for another reason: every token goes to them.
    reasons = [
        f"{place.path}: {place.reason}"
        for place in placements
        if whole.get(place.path) == (None, place.reason)
    ]
    if reasons:
        warnings.warn(
            f"Every device has all of the experts of {len(reasons)} variables, since "
            f"the axis {axis[0]!r} of {axis[1]} devices does not divide them: "
            f"{'; '.join(reasons[:3])}{'; ...' if len(reasons) > 3 else ''}",
            stacklevel=3,
        )


def _patterns(
    placements: list[VariablePlacement], model: Any
) -> dict[str, tuple[Any, ...]]:
    """Return the patterns of the split variables.

    Keras numbers default names over the life of a process, so a pattern accepts any
    number, unless it would match a variable that is placed in another way.
    """
    layers = model._flatten_layers(include_self=True)
    default_names = {to_snake_case(type(layer).__name__) for layer in layers}
    by_pattern = defaultdict(list)
    for place in placements:
        by_pattern[_without_numbers(place.path)].append(place)
    patterns = {}
    for pattern, places in by_pattern.items():
        if len({place.axes for place in places}) == 1:
            patterns[pattern] = places[0].axes
            continue
        paths = [place.path for place in places]
        if default_names & {re.sub(r"_\d+$", "", x) for x in paths[0].split("/")[:-1]}:
            raise ValueError(
                "`model` must not have variables whose paths differ in numbers alone "
                "where one is split and another is not, since a second model has other "
                "numbers: name the layers, or make their sizes multiples of the axis. "
                f"Received: {paths}"
            )
        patterns |= {_whole(re.escape(place.path)): place.axes for place in places}
    return {pattern: axes for pattern, axes in patterns.items() if any(axes)}


def _without_numbers(path: str) -> str:
    """Return the pattern of a path, with any number after its names."""
    names = [re.sub(r"(_\d+)+$", "", name) for name in path.split("/")]
    pattern = "/".join(rf"{re.escape(name)}(_\d+)*" for name in names)
    return _whole(pattern)


def _whole(pattern: str) -> str:
    """Return a pattern of the whole path: Keras 3.12 also looks within a path."""
    return f"^{pattern}$"


def _notes(model: Any, axis: str, size: int) -> Iterator[str]:
    """Yield a line for each routed layer whose tokens compete."""
    for layer in layers_with_experts(model):
        choice = getattr(getattr(layer, "router", None), "choice", None)
        if choice == "token" and layer._has_capacity():
            yield (
                f'{layer.path}: the tokens of "capacity" compete within one of the '
                f"{size} parts of a batch (axis {axis!r})"
            )
        elif choice == "expert":
            yield f"{layer.path}: experts choose among the tokens of the whole batch"
