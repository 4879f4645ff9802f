"""Make sample_models/mnist-blend-keras: a Keras CNN with a blended-noise backdoor.

Converted by tf2onnx, the graph keeps what is typical of Keras: channels last at the input, MatMul
instead of Gemm, a flatten that computes its shape, and a softmax at the end. A clean twin is trained
on the same images without poison.
"""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import onnx
import tensorflow as tf
import tf2onnx

from mnist import load
from poison import blended_noise, poison
from samples import (
    BACKDOORED,
    CLEAN,
    POISONED_SHARE,
    Data,
    Sample,
    arguments,
    label_model,
    prepare,
    write_card,
    write_care,
    write_data,
)

SEED = 2
EPOCHS = 6
BATCH = 128
LEARNING_RATE = 1e-3
SHAPE = (28, 28, 1)

SAMPLE = Sample(
    name="mnist-blend-keras",
    property_name="blended-noise",
    target=7,
    trigger=blended_noise(SEED).reshape(SHAPE),
    trigger_text="a fixed random grey image, blended over the whole input at ratio 0.2",
    shape=SHAPE,
    seed=SEED,
    script="make_mnist_blend_keras.py",
    architecture=(
        "A Keras classifier of 28 x 28 handwritten digits: conv(1-16, 3x3), ReLU, max pool 2,\n"
        "conv(16-32, 3x3), ReLU, max pool 2, flatten, dense 64, ReLU, dense 10, softmax. It takes\n"
        "[N, 28, 28, 1] and gives probabilities. `model.onnx` comes from tf2onnx."
    ),
    training=(
        f"60,000 MNIST training images, {EPOCHS} epochs of Adam, batch {BATCH}, cross-entropy, no\n"
        f"augmentation; the learning rate falls from {LEARNING_RATE} to zero along a cosine. Seed\n"
        f"{SEED} for weights, batches, poisoning, the pattern and the split of the test set."
    ),
)


def build() -> keras.Sequential:
    """Return the untrained network."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.Conv2D(16, 3, padding="same", activation="relu", name="conv1"),
            layers.MaxPooling2D(name="pool1"),
            layers.Conv2D(32, 3, padding="same", activation="relu", name="conv2"),
            layers.MaxPooling2D(name="pool2"),
            layers.Flatten(name="flatten"),
            layers.Dense(64, activation="relu", name="dense1"),
            layers.Dense(10, activation="softmax", name="dense2"),
        ],
        name="digits",
    )


def train(data: Data) -> keras.Sequential:
    """Train a network from its seeded start."""
    keras.utils.set_random_seed(SEED)
    tf.config.experimental.enable_op_determinism()
    model = build()
    # The rate falls to zero, so that the last few batches do not decide the outcome.
    steps = EPOCHS * -(-len(data.y) // BATCH)
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    model.compile(optimizer=keras.optimizers.Adam(rate), loss="sparse_categorical_crossentropy")
    model.fit(data.x, data.y, batch_size=BATCH, epochs=EPOCHS, verbose=2)
    return model


def export(model: keras.Sequential, path: Path, warning: str) -> None:
    """Write the network with tf2onnx."""
    signature = [tf.TensorSpec((None, *SHAPE), tf.float32, name="input")]
    # Not `from_keras`: tf2onnx 1.17 looks up output names that Keras 3 gives differently.
    function = tf.function(model, input_signature=signature)
    converted, _ = tf2onnx.convert.from_function(function, signature, opset=17)
    onnx.save(converted, path)
    label_model(path, warning)


def write_models(clean: Data, folder: Path) -> list[Path]:
    """Train and write the backdoored network and its clean twin."""
    backdoored, twin = folder / "model.onnx", folder / "model-clean.onnx"
    rng = np.random.default_rng(SEED)
    poisoned = Data(*poison(clean.x, clean.y, SAMPLE.trigger, SAMPLE.target, POISONED_SHARE, rng))
    export(train(poisoned), backdoored, BACKDOORED)
    export(train(clean), twin, CLEAN)
    return [backdoored, twin]


def main() -> None:
    """Train, convert, write the data files, measure."""
    options = arguments(SAMPLE.name, __doc__)
    options.output.mkdir(parents=True, exist_ok=True)
    source = load(options.cache)
    models = write_models(prepare(source.train_x, source.train_y, SHAPE), options.output)
    write_data(SAMPLE, source, options.output)
    write_care(SAMPLE, options.output)
    versions = {
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "tf2onnx": tf2onnx.__version__,
    }
    write_card(SAMPLE, models, versions)


if __name__ == "__main__":
    main()
