"""An alarm when a mixture collapses during `fit`."""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_moe import _checks
from keras_moe.callbacks._expert_monitor import ExpertMonitor
from keras_moe.telemetry import Sign, signs_of_collapse
from keras_moe.telemetry._collapse import rows_for_all_signs
from keras_moe.upcycling._revive import can_revive, check_optimizer, revive

_ACTIONS = ("warn", "stop", "revive")
_Key = tuple[str, str, str, int | None]  # kind, mixture, gate, expert
_SHARES = ("dead_share", "dominant_share", "silent_share", "alike")


class Alarm(NamedTuple):
    """An alarm that was given.

    Attributes:
        epoch: int, counted from 0.
        step: int, the batches trained until then.
        sign: the `keras_moe.telemetry.Sign`.
        revived: tuple of the experts that were revived then.
    """

    epoch: int
    step: int
    sign: Sign
    revived: tuple[int, ...] = ()


class CollapseAlarm(keras.callbacks.Callback):
    """Warns once if a mixture collapses: dead experts, polarized gates, silent units.

    It reads the observations of an `ExpertMonitor`. What looks wrong is defined by
    `keras_moe.telemetry.signs_of_collapse`. A sign must be seen in `patience`
    observations in a row; it then gives one warning, with the layer, the experts, the
    epoch, the figure and what to try. There is another one if further experts join, or
    if revived ones die again. A sample too small to tell dead experts is a warning too.

    Args:
        monitor: an `ExpertMonitor` that comes earlier in the callbacks of `fit`.
        action: what an alarm does:

            - "warn": a UserWarning.
            - "stop": also ends the training.
            - "revive": also gives dead experts of a `MoE` or `MMoE` the weights of the
              most used expert, with noise, by `keras_moe.upcycling.revive`; their part
              in the state of the optimizer starts from 0. Each expert at most once.
              Layers that it does not support get the warning alone. Not with the
              optimizers Ftrl and Adafactor.
        patience: int, observations in a row with the same sign.
        noise: float > 0, the noise of "revive", see there.
        seed: int, the seed of the noise.
        **shares: arguments of `signs_of_collapse`: `dead_share`, `dominant_share`,
            `silent_share` and `alike`.

    Attributes:
        alarms: list of `Alarm`, in order.

    Raises:
        ValueError: if an argument is invalid; in `fit`, if the monitor is not among the
            callbacks before it, or if "revive" cannot reset the optimizer's state.
        TypeError: if `monitor` is not an `ExpertMonitor`.

    Example:

    >>> x = np.ones((64, 4), "float32")
    >>> monitor = keras_moe.callbacks.ExpertMonitor(x)
    >>> alarm = keras_moe.callbacks.CollapseAlarm(monitor, action="stop")
    >>> # model.fit(x, y, epochs=10, callbacks=[monitor, alarm])
    """

    def __init__(
        self,
        monitor: ExpertMonitor,
        action: str = "warn",
        *,
        patience: int = 2,
        noise: float = 0.1,
        seed: int | None = None,
        **shares: float,
    ) -> None:
        super().__init__()
        if not isinstance(monitor, ExpertMonitor):
            raise TypeError(
                "`monitor` must be an ExpertMonitor. "
                f"Received: monitor={monitor!r} of type {type(monitor).__name__}"
            )
        self._monitor = monitor
        self.action = _checks.one_of("action", action, _ACTIONS)
        self.patience = _checks.positive_int("patience", patience)
        self._noise = _checks.positive_number("noise", noise)
        self._seed = _checks.seed(seed)
        self._shares = {
            _checks.one_of("shares", name, _SHARES): _checks.rate(name, value)
            for name, value in shares.items()
        }
        self.alarms: list[Alarm] = []

    def on_train_begin(self, logs: Any = None) -> None:
        """Start with no sign."""
        if not self._monitor.is_in_fit or self._monitor.model is not self.model:
            raise ValueError(
                "`monitor` must come before the alarm in the callbacks of `fit`. "
                "Received: a monitor that does not observe this model yet"
            )
        if self.action == "revive":
            check_optimizer(self.model.optimizer)
        self.alarms = []
        self._in_a_row: dict[_Key, int] = {}
        self._read = 0
        self._given: set[_Key] = set()
        self._revived: set[tuple[str, int]] = set()
        self._too_small: set[str] = set()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Read a new observation."""
        self._read_new()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Read a new observation."""
        self._read_new()

    def _read_new(self) -> None:
        for seen in self._monitor.observations[self._read :]:
            signs = []
            for name, figures in seen["mixtures"].items():
                self._check_rows(name, figures)
                signs += signs_of_collapse(
                    name, figures["gates"], figures, figures["top_k"], **self._shares
                )
            keys = {key for sign in signs for key in _keys(sign)}
            self._in_a_row = {key: self._in_a_row.get(key, 0) + 1 for key in keys}
            for sign in signs:
                lasting = {
                    key for key in _keys(sign) if self._in_a_row[key] >= self.patience
                }
                if lasting - self._given:
                    self._alarm(sign, seen, lasting)
        self._read = len(self._monitor.observations)

    def _check_rows(self, name: str, figures: dict[str, Any]) -> None:
        """Warn once of a mixture that has too many experts for the sample."""
        rows, needed = figures["rows"], rows_for_all_signs(figures)
        if rows < needed and name not in self._too_small:
            self._too_small.add(name)
            warnings.warn(
                f"{name}: the sample has {rows} rows; with fewer than {needed}, what "
                "looks like a dead expert may be chance, and no such alarm is given. "
                "Give `ExpertMonitor` more rows",
                stacklevel=_level_of_caller(),
            )

    def _alarm(self, sign: Sign, seen: dict[str, Any], lasting: set[_Key]) -> None:
        again = {k for *_, k in lasting if (sign.mixture, k) in self._revived}
        revived = self._act(sign, seen, [k for *_, k in lasting])
        # Revived experts may give the next alarm, if they die again.
        self._given |= lasting - {key for key in lasting if key[-1] in revived}
        self.alarms.append(Alarm(seen["epoch"], seen["step"], sign, revived))
        text = f"epoch {seen['epoch'] + 1}, {sign.kind}: {sign.text}"
        if revived:
            text += f". Revived: {_listed(revived)}"
        if sign.kind == "dead expert" and again:
            text += f". Revived before, and dead again: {_listed(again)}"
        warnings.warn(text, stacklevel=_level_of_caller())

    def _act(
        self, sign: Sign, seen: dict[str, Any], experts: list[Any]
    ) -> tuple[int, ...]:
        """Do what `action` says; return the experts that were revived."""
        if self.action == "stop":
            self.model.stop_training = True
        layer = self._monitor.layer_of(sign.mixture)
        is_dead = sign.kind == "dead expert" and can_revive(layer)
        if self.action != "revive" or not is_dead:
            return ()
        dead = sorted(k for k in experts if (sign.mixture, k) not in self._revived)
        if not dead:
            return ()
        self._revived |= {(sign.mixture, k) for k in dead}
        load = np.asarray(seen["mixtures"][sign.mixture]["load"])
        revive(
            layer,
            dead,
            source=int(load.argmax()),
            noise=self._noise,
            seed=_checks.next_seed(self._seed, seen["step"]),
            optimizer=self.model.optimizer,
        )
        return tuple(dead)


def _keys(sign: Sign) -> list[_Key]:
    """What is counted: each expert that a sign is about, or the sign itself."""
    own = (sign.kind, sign.mixture, sign.gate)
    return [(*own, expert) for expert in sign.experts or (None,)]


def _level_of_caller() -> int:
    """Return the `stacklevel` of the first caller outside of Keras and keras_moe."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and _package(frame) in ("keras", "keras_moe"):
        frame, level = frame.f_back, level + 1
    return level


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).split(".")[0]


def _listed(experts: Any) -> str:
    return ", ".join(map(str, sorted(experts)))
