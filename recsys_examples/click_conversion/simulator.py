"""Impressions, clicks and conversions with known probabilities.

Axis letters: n rows, d features, q nodes of a quadrature.

An impression has features x (standard normal) and a hidden u (standard normal,
independent of x). With three functions of separate random directions of x, each of mean
0 and variance 1, independent of each other (g: random networks, r: linear, which also
gives the curve b(r) = (r^2 - 1) / sqrt(2)):

    click logit       s_y = a_y + signal g_y(x) + covariate_shift r(x) + confounding u
    conversion logit  s_z = a_z + signal (p g_y(x) + sqrt(1 - p^2) c(x)) + confounding u
    c(x) = (g_z(x) + b(r(x))) / sqrt(2),  p the correlation

Without shift and confounding, corr(s_y, s_z) = p; with p = 1 or -1, conversions do not
depend on r, and a shift has no effect. Conversion labels are drawn for all rows, and
observed where a row was clicked.

There are two kinds of selection bias, which are easily confused:

* `covariate_shift`: clicks are rare at low r, where the conversion rate bends. The
  probability of a conversion given x is the same with and without a click, so a model
  of enough capacity and data learns it from clicked rows. A model that is too simple,
  or has few rows there, extrapolates from the clicked region and is wrong over all
  impressions. Weights 1 / P(click | x) (IPW, and DR with an imputation model) make the
  loss over clicked rows an unbiased estimate of that over all, with more variance.
  ESMM has its losses over all impressions, but a row without a click says nothing about
  its conversion, so ESMM corrects the shift only in part.
* `confounding`: u raises both probabilities and is in no feature. Clicked rows have
  larger u, so E[conversion | x, click] is larger than the probability of a conversion
  if the impression were clicked, at every x and for every model. A propensity of x does
  not correct this, and neither does ESMM: its pCVR = P(click, conversion | x) /
  P(click | x) is E[conversion | x, click], the target of the naive model. Without
  further assumptions nothing corrects it fully. P(click, conversion | x) itself is
  learned without bias by entire-space models, as its label is known for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recsys_examples.click_conversion.data import Dataset, Part, split_part

CLICK, CONVERSION = "click", "conversion"

# Names in `Part.truth`.
P_CLICK = "click_probability"
P_CONVERSION = "conversion_probability"
P_CONVERSION_GIVEN_CLICK = "conversion_given_click"
P_BOTH = "click_and_conversion"
COUNTERFACTUAL = "conversion_if_clicked"

_HIDDEN = 16  # units of the random networks
_NODES = 32  # of the quadrature over u
_REFERENCE_ROWS = 20_000  # on which a network is scaled to variance 1


@dataclass(frozen=True)
class Impressions:
    """Settings of the simulated impressions.

    Args:
        rows: number of impressions.
        features: number of features, d >= 3: one third of the directions for each of
            the three functions.
        users: number of users; the features of a user's impressions are correlated.
        user_share: in [0, 1), share of the variance of the features that is the same
            for all impressions of a user.
        click_rate: in (0, 1), mean click probability.
        conversion_rate: in (0, 1), mean of the conversion probability over all
            impressions, had they been clicked. Over clicked rows it is larger with a
            positive correlation or with confounding.
        correlation: p in [-1, 1], of the two logits without bias.
        signal: standard deviation of the function of x in both logits.
        covariate_shift: >= 0, see above; 0 for none.
        confounding: >= 0, see above; 0 for none.

    Raises:
        ValueError: if a setting is out of range.
    """

    rows: int = 200_000
    features: int = 12
    users: int = 20_000
    user_share: float = 0.3
    click_rate: float = 0.1
    conversion_rate: float = 0.2
    correlation: float = 0.3
    signal: float = 1.5
    covariate_shift: float = 0.0
    confounding: float = 0.0

    def __post_init__(self) -> None:
        for name, lowest in (("rows", 1), ("features", 3), ("users", 3)):
            if getattr(self, name) < lowest:
                raise ValueError(
                    f"{name} must be at least {lowest}; got {getattr(self, name)}"
                )
        for name in ("click_rate", "conversion_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be in (0, 1); got {getattr(self, name)}")
        if not 0 <= self.user_share < 1:
            raise ValueError(f"user_share must be in [0, 1); got {self.user_share}")
        if not -1 <= self.correlation <= 1:
            raise ValueError(f"correlation must be in [-1, 1]; got {self.correlation}")
        for name in ("signal", "covariate_shift", "confounding"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0; got {getattr(self, name)}")


def simulate(settings: Impressions, seed: int = 0) -> Dataset:
    """Sample impressions and split them by user; see `sample_impressions`.

    Example:

    >>> data = simulate(Impressions(rows=5000, users=500, confounding=1.0))
    >>> truth = data.test.truth
    >>> bool((truth["conversion_given_click"] > truth["conversion_probability"]).all())
    True
    """
    return split_part(sample_impressions(settings, seed), seed, name=_name(settings))


def sample_impressions(settings: Impressions, seed: int = 0) -> Part:
    """Sample impressions.

    Args:
        settings: the settings.
        seed: seed of the functions, the features and all draws. The features and the
            functions do not depend on rates, correlation or bias: runs with the same
            seed can be paired.

    Returns:
        n rows with the numbers `x0`, `x1`, ... (standard normal), the labels `click`
        (0 or 1) and `conversion` (0 or 1, NaN without a click), the user as group, and
        the truth:

        * `click_probability`: P(click | x);
        * `conversion_probability`: the probability of a conversion if the impression
          were clicked, given x, averaged over u: by this, pCVR is to be judged over all
          impressions;
        * `conversion_given_click`: E[conversion | x, click], what a naive model and the
          pCVR of ESMM estimate; equal to the above without confounding;
        * `click_and_conversion`: P(click, conversion | x), for pCTCVR;
        * `conversion_if_clicked`: 0 or 1, the conversion label of every row, as drawn
          with its u, for AUC and calibration over all impressions. On clicked rows it
          is the observed label.
    """
    rng_functions, rng_rows, rng_labels = np.random.default_rng(seed).spawn(3)
    d = settings.features
    rotation, _ = np.linalg.qr(rng_functions.normal(size=(d, d)))
    blocks = np.array_split(rotation, 3, axis=1)  # each (d, about d / 3)
    click_network = _Network(blocks[0], rng_functions)
    conversion_network = _Network(blocks[1], rng_functions)
    shift_direction = blocks[2][:, 0]

    groups, x = _features(settings, rng_rows)
    g_click = click_network(x)
    shift = x @ shift_direction
    bend = (shift**2 - 1) / np.sqrt(2)
    own = (conversion_network(x) + bend) / np.sqrt(2)
    p = settings.correlation
    click = settings.signal * g_click + settings.covariate_shift * shift
    conversion = settings.signal * (p * g_click + np.sqrt(1 - p**2) * own)

    strength = settings.confounding
    click += _intercept(click, strength, settings.click_rate)
    conversion += _intercept(conversion, strength, settings.conversion_rate)
    truth = _truth(click, conversion, strength)

    u = rng_labels.standard_normal(len(x))
    uniform = rng_labels.random((2, len(x)))
    clicked = uniform[0] < _sigmoid(click + strength * u)
    converts = uniform[1] < _sigmoid(conversion + strength * u)
    truth[COUNTERFACTUAL] = converts.astype(np.float64)
    labels = {
        CLICK: clicked.astype(np.float32),
        CONVERSION: np.where(clicked, converts, np.nan).astype(np.float32),
    }
    return Part(
        {f"x{i}": x[:, i].astype(np.float32) for i in range(d)},
        labels,
        groups,
        np.zeros(len(x), np.int32),
        truth,
    )


class _Network:
    """A random network of one tanh layer, scaled to mean 0 and variance 1.

    Args:
        directions: (d, k) orthonormal directions of x, the inputs of the network.
        rng: generator of the weights and of the rows for the scale.
    """

    def __init__(self, directions: np.ndarray, rng: np.random.Generator) -> None:
        inputs = directions.shape[1]
        self._first = directions @ rng.normal(
            scale=2 / np.sqrt(inputs), size=(inputs, _HIDDEN)
        )
        self._bias = rng.normal(size=_HIDDEN)
        self._second = rng.normal(size=_HIDDEN)
        self._mean, self._deviation = 0.0, 1.0
        values = self(rng.standard_normal((_REFERENCE_ROWS, len(directions))))
        self._mean, self._deviation = values.mean(), values.std()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the (n,) values of rows (n, d)."""
        values = np.tanh(x @ self._first + self._bias) @ self._second
        return (values - self._mean) / self._deviation


def _features(
    settings: Impressions, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the (n,) users and the (n, d) features."""
    groups = rng.integers(settings.users, size=settings.rows)
    of_user = rng.standard_normal((settings.users, settings.features))
    own = rng.standard_normal((settings.rows, settings.features))
    share = settings.user_share
    return groups, np.sqrt(share) * of_user[groups] + np.sqrt(1 - share) * own


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * logits))


def _quadrature(strength: float) -> list[tuple[float, float]]:
    """Return pairs (strength * u, weight) for averages over a standard normal u."""
    if strength == 0:
        return [(0.0, 1.0)]
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    return list(zip(strength * nodes, weights / weights.sum(), strict=True))


def _intercept(logits: np.ndarray, strength: float, rate: float) -> float:
    """Return the intercept with which the mean probability of the rows is `rate`.

    The mean is taken on a grid of 1,000 quantiles of the logits, precise to about 1e-4.
    """
    grid = np.quantile(logits, (np.arange(1000) + 0.5) / 1000)
    low, high = -30.0 - grid.max(), 30.0 - grid.min()
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(
            weight * _sigmoid(grid + middle + shift).mean()
            for shift, weight in _quadrature(strength)
        )
        low, high = (middle, high) if mean < rate else (low, middle)
    return (low + high) / 2


def _truth(
    click: np.ndarray, conversion: np.ndarray, strength: float
) -> dict[str, np.ndarray]:
    """Return the probabilities given x, averaged over u."""
    p_click, p_conversion, both = (np.zeros_like(click) for _ in range(3))
    for shift, weight in _quadrature(strength):
        clicks, conversions = _sigmoid(click + shift), _sigmoid(conversion + shift)
        p_click += weight * clicks
        p_conversion += weight * conversions
        both += weight * clicks * conversions
    return {
        P_CLICK: p_click,
        P_CONVERSION: p_conversion,
        P_CONVERSION_GIVEN_CLICK: both / p_click,
        P_BOTH: both,
    }


def _name(settings: Impressions) -> str:
    return (
        f"simulated impressions (covariate shift {settings.covariate_shift:g}, "
        f"confounding {settings.confounding:g})"
    )
