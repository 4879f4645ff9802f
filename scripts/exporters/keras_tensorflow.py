"""Keras and TensorFlow: one Keras network, written in two ways, and one of TensorFlow alone."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import tf2onnx

from exporters.catalogue import files
from exporters.digits import CLASSES, SEED, SHAPES, Parts, laid_out
from samples import Data

VERSIONS = {"tensorflow": tf.__version__, "keras": keras.__version__, "tf2onnx": tf2onnx.__version__}
MODELS = files("tensorflow")
EPOCHS, BATCH, LEARNING_RATE = 30, 32, 3e-3
HIDDEN = 48
OPSET = 17


def build() -> keras.Sequential:
    """Return the untrained Keras network."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(SHAPES["last"], name="image"),
            layers.Conv2D(8, 3, padding="same", activation="relu", name="conv1"),
            layers.MaxPooling2D(name="pool1"),
            layers.Conv2D(16, 3, padding="same", activation="relu", name="conv2"),
            layers.MaxPooling2D(name="pool2"),
            layers.Flatten(name="flatten"),
            layers.Dense(32, activation="relu", name="dense1"),
            layers.Dense(CLASSES, activation="softmax", name="dense2"),
        ],
        name="digits",
    )


def train_keras(data: Data) -> keras.Sequential:
    """Train the Keras network from its seeded start."""
    keras.utils.set_random_seed(SEED)
    model = build()
    model.compile(optimizer=keras.optimizers.Adam(_falling(data)), loss="sparse_categorical_crossentropy")
    model.fit(data.x, data.y, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    return model


class Dense(tf.Module):
    """Two dense layers, of TensorFlow's own operations."""

    def __init__(self, start: np.random.Generator) -> None:
        """Draw the weights."""
        super().__init__()
        sizes = (SHAPES["flat"][0], HIDDEN, CLASSES)
        self.weights = [
            tf.Variable(start.normal(0, (2 / rows) ** 0.5, (rows, columns)).astype(np.float32))
            for rows, columns in itertools.pairwise(sizes)
        ]
        self.biases = [tf.Variable(tf.zeros(columns)) for columns in sizes[1:]]

    @tf.function(input_signature=[tf.TensorSpec((None, *SHAPES["flat"]), tf.float32, name="pixels")])
    def __call__(self, pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return the logits of a batch."""
        hidden = tf.nn.relu(pixels @ self.weights[0] + self.biases[0])
        return {"logits": hidden @ self.weights[1] + self.biases[1]}


def train_tensorflow(data: Data) -> Dense:
    """Train the network of TensorFlow alone from its seeded start."""
    rng = np.random.default_rng(SEED)
    model = Dense(rng)
    variables = [*model.weights, *model.biases]
    optimizer = keras.optimizers.Adam(_falling(data))
    for _ in range(EPOCHS):
        order = rng.permutation(len(data.y))
        for rows in np.split(order, range(BATCH, len(order), BATCH)):
            with tf.GradientTape() as tape:
                logits = model(tf.constant(data.x[rows]))["logits"]
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(data.y[rows], logits))
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    return model


def write(parts: Parts, folder: Path) -> None:
    """Train both networks, and write the Keras one twice."""
    tf.config.experimental.enable_op_determinism()
    exported, converted, saved = (folder / name for name in MODELS)
    model = train_keras(laid_out(parts.training, "last"))
    model.export(str(exported), format="onnx", verbose=False)
    with tempfile.TemporaryDirectory() as scratch:
        model.save(Path(scratch) / "digits.keras")
        # Not `from_keras`: tf2onnx 1.17 looks up output names that Keras 3 gives differently.
        _convert(scratch, "--keras", "digits.keras", converted)
        dense = train_tensorflow(parts.training)
        tf.saved_model.save(dense, f"{scratch}/saved", signatures=dense.__call__)
        _convert(scratch, "--saved-model", "saved", saved)


def _convert(folder: str, kind: str, source: str, target: Path) -> None:
    """Run the command line of tf2onnx, in the folder of the source: its path would stand in the model."""
    words = [kind, source, "--output", target.resolve(), "--opset", OPSET]
    subprocess.run([sys.executable, "-m", "tf2onnx.convert", *map(str, words)], cwd=folder, check=True)


def _falling(data: Data) -> keras.optimizers.schedules.CosineDecay:
    """Return a rate that falls to zero, so that the last few batches do not decide the outcome."""
    return keras.optimizers.schedules.CosineDecay(LEARNING_RATE, EPOCHS * -(-len(data.y) // BATCH))
