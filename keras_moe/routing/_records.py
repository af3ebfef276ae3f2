"""The records between routers and dispatches, and checks of their shapes.

Axis letters: n tokens, e experts, k choices per token, c capacity (slots per expert),
m = n * k choices of all tokens.
"""

from __future__ import annotations

from collections import namedtuple
from functools import cache
from typing import Any, NamedTuple

from keras import KerasTensor, ops

from keras_moe import _checks


class Record:
    """A named tuple with optional fields.

    A field that is None is left out of the tuple, because the outputs of an operation
    in a functional model must be tensors. Its attribute is still None.

    Attributes:
        kind: `Routing`, `ExpertChoiceRouting` or `DenseRouting`.
    """

    __slots__ = ()
    kind: type[Record]
    _fields: tuple[str, ...]

    def __init_subclass__(cls) -> None:
        if "_fields" not in vars(cls) and not issubclass(cls, tuple):
            cls.kind = cls
            cls._fields = tuple(cls.__annotations__)

    def __new__(cls, *values: Any, **named: Any) -> Any:
        """Return a record of the fields that are not None."""
        fields = dict(zip(cls._fields, values, strict=False))
        unknown = [name for name in named if name not in cls._fields or name in fields]
        fields |= named
        missing = [n for n in cls._fields if n not in fields and not hasattr(cls, n)]
        if unknown or missing or len(values) > len(cls._fields):
            raise TypeError(
                f"{cls.__name__} takes {', '.join(cls._fields)}. Received "
                f"{len(values)} positional arguments and {sorted(named)}."
            )
        present = tuple(n for n in cls._fields if fields.get(n) is not None)
        if "mask" in present:
            # Last: a functional model identifies outputs by position, and a mask may be
            # attached to its inputs after the model was built.
            present = (*[n for n in present if n != "mask"], "mask")
        kind = _record_type(cls, present)  # type: ignore[arg-type]
        return kind(*[fields[name] for name in present])

    def _replace(self, **changes: Any) -> Any:
        """Return the record with other values; None removes a field."""
        return self.kind(**{**self._given(), **changes})

    def _given(self) -> dict[str, Any]:
        """Return all fields by name, with None for missing fields."""
        return {name: getattr(self, name) for name in self.kind._fields}

    def __reduce__(self) -> Any:
        return _remade, (self.kind, self._given())


def _remade(kind: type[Record], fields: dict[str, Any]) -> Any:
    return kind(**fields)


@cache
def _record_type(kind: type[Record], present: tuple[str, ...]) -> Any:
    """Return the named tuple of the fields that are present, a subclass of `kind`."""
    # The tuple comes first: its fields override the defaults in `kind`.
    bases = (namedtuple(kind.__name__, present), kind)
    missing = {name: None for name in kind._fields if name not in present}
    return type(
        kind.__name__,
        bases,
        {
            "__slots__": (),
            "_replace": Record._replace,
            "__reduce__": Record.__reduce__,
            **missing,
        },
    )


class Routing(Record):
    """Each token chooses k experts.

    Attributes:
        expert_indices: `(n, k)` int32 in [0, e), the first choice first. Rows of masked
            tokens are undefined.
        combine_weights: `(n, k)` float, the weight of each choice in the output. None
            returns the output of each choice; an index of e then means no expert.
        router_logits: `(n, e)` float, or None for a router without logits.
        router_probs: `(n, e)` float in [0, 1], or None for a router without scores.
        mask: `(n,)` bool, False for padding, or None. Padding is not routed.
        choice_probs: `(n, e)` float, the probability that a token chooses an expert if
            the noise of the router is resampled (0 or 1 in inference), or None for a
            router without noise.
    """

    expert_indices: Any
    combine_weights: Any
    router_logits: Any = None
    router_probs: Any = None
    mask: Any = None
    choice_probs: Any = None


class ExpertChoiceRouting(Record):
    """Each expert chooses c tokens.

    Attributes:
        token_indices: `(e, c)` int32 in [0, n), the best token first; n in slots
            without a token.
        combine_weights: `(e, c)` float, 0 in the slots without a token.
        router_logits: `(n, e)` float.
        router_probs: `(n, e)` float.
        mask: `(n,)` bool, False for padding, or None.
        invalid: `(n,)` bool, True for tokens whose logits are not finite. No expert
            chooses them (they take no slot from other tokens), and their outputs are
            NaN.
    """

    token_indices: Any
    combine_weights: Any
    router_logits: Any = None
    router_probs: Any = None
    mask: Any = None
    invalid: Any = None


class DenseRouting(Record):
    """Each token goes to every expert.

    Attributes:
        combine_weights: `(n, e)` float.
        router_logits: `(n, e)` float.
        router_probs: `(n, e)` float.
        mask: `(n,)` bool, False for padding, or None.
    """

    combine_weights: Any
    router_logits: Any = None
    router_probs: Any = None
    mask: Any = None


class SortedChoices(NamedTuple):
    """The m choices sorted by expert: each expert has a contiguous run of rows.

    Attributes:
        order: `(m,)` int32, the choice in each row.
        positions: `(n, k)` int32, the row of each choice.
        starts: `(e,)` int32, the first row of each expert.
        ends: `(e,)` int32, the last row of each expert, plus 1. The choices of padding
            tokens follow the last run.
    """

    order: Any
    positions: Any
    starts: Any
    ends: Any


class Slots(NamedTuple):
    """Slots for tokens, of static shape: s groups of c slots.

    Attributes:
        tokens: `(s, c)` int32 in [0, n), the token in each slot; n in an empty slot.
        slot_of_choice: `(n, k)` int32, the flat index, in [0, s * c), of each choice's
            slot. Undefined where `kept` is False.
        kept: `(n, k)` bool, whether the choice has a slot.
    """

    tokens: Any
    slot_of_choice: Any
    kept: Any


_AXES: dict[type, dict[str, str]] = {
    Routing: {
        "expert_indices": "nk",
        "combine_weights": "nk?",
        "router_logits": "ne?",
        "router_probs": "ne?",
        "mask": "n?",
        "choice_probs": "ne?",
    },
    ExpertChoiceRouting: {
        "token_indices": "ec",
        "combine_weights": "ec",
        "router_logits": "ne?",
        "router_probs": "ne?",
        "mask": "n?",
        "invalid": "n?",
    },
    DenseRouting: {
        "combine_weights": "ne",
        "router_logits": "ne?",
        "router_probs": "ne?",
        "mask": "n?",
    },
}


def checked_record(
    routing: Any, num_experts: int, num_tokens: Any = None, *, kinds: Any = tuple(_AXES)
) -> Any:
    """Return the record with its fields as tensors, after checking their shapes.

    Args:
        routing: a record of one of `kinds`.
        num_experts: int, e.
        num_tokens: int, n (or a tensor if n is data-dependent). Not checked by default.
        kinds: tuple of classes. All three by default.

    Returns:
        A record of the same kind.

    Raises:
        ValueError: if `routing` is not such a record, a field has the wrong shape, or
            indices are not integers.
    """
    if not isinstance(routing, kinds):
        raise ValueError(
            f"`routing` must be one of {[kind.__name__ for kind in kinds]} of "
            f"keras_moe.routing. Received: routing of type {type(routing).__name__}"
        )
    specs = next(specs for kind, specs in _AXES.items() if isinstance(routing, kind))
    sizes: dict[str, Any] = {
        "num_experts": (_checks.positive_int("num_experts", num_experts), "=e")
    }
    if num_tokens is not None:
        sizes["num_tokens"] = (_checks.scalar("num_tokens", num_tokens, True), "=n")
    fields = {
        f"routing.{name}": (getattr(routing, name), specs[name]) for name in specs
    }
    _checks.axes(**sizes, **fields)
    for name in ("expert_indices", "token_indices"):
        if name in specs:
            _checks.integers(**{f"routing.{name}": getattr(routing, name)})
    arrays = {
        name: ops.convert_to_tensor(getattr(routing, name))
        for name in specs
        if not is_tensor(getattr(routing, name))
    }
    return routing._replace(**arrays) if arrays else routing


def is_tensor(value: Any) -> bool:
    """Whether `value` is a tensor (eager or symbolic) or None."""
    return value is None or ops.is_tensor(value) or isinstance(value, KerasTensor)


def tensor(value: Any) -> Any:
    """Return `value` as a tensor; None stays None."""
    return value if is_tensor(value) else ops.convert_to_tensor(value)
