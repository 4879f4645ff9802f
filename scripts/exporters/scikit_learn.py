"""scikit-learn through skl2onnx, as it stands where nothing is said: networks and linear models, of two kinds each."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import skl2onnx
import sklearn
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from exporters.catalogue import files
from exporters.digits import SEED, Parts

VERSIONS = {"scikit-learn": sklearn.__version__, "skl2onnx": skl2onnx.__version__}
MODELS = files("sklearn")
HIDDEN = (32, 16)
EPOCHS = 200
OPSETS = {"": 17, "ai.onnx.ml": 3}


def estimators() -> dict[str, BaseEstimator]:
    """Return the untrained models, by file."""
    found = (
        MLPClassifier(HIDDEN, max_iter=EPOCHS, random_state=SEED),
        # Numbers take a second-order method and some weight decay on so few images.
        MLPRegressor(hidden_layer_sizes=HIDDEN, solver="lbfgs", alpha=1, max_iter=400, random_state=SEED),
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
        make_pipeline(StandardScaler(), LinearSVC(C=0.1, random_state=SEED)),
        LinearRegression(),
    )
    return dict(zip(MODELS, found, strict=True))


def write(parts: Parts, folder: Path) -> None:
    """Train and convert every model."""
    data = parts.training
    for name, estimator in estimators().items():
        # skl2onnx 1.20 asks for a ZipMap behind this classifier, too, unless its options say something else.
        options = {LinearSVC: {"raw_scores": True}} if name == "sklearn-linear-svc.onnx" else None
        trained = fit(estimator, data.x, data.y)
        converted = skl2onnx.to_onnx(trained, data.x[:1], name="digits", options=options, target_opset=OPSETS)
        (folder / name).write_bytes(converted.SerializeToString())


def fit(estimator: BaseEstimator, x: np.ndarray, y: np.ndarray) -> BaseEstimator:
    """Train a model on one thread: batches this small are slower on several, and sums depend on their number."""
    with warnings.catch_warnings(), threadpool_limits(1):
        # A fixed number of epochs is meant; scikit-learn would go on to the last digit of the loss.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(x, y)
