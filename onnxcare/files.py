"""The public functions that need no repair: put a patch file to use, and show what differs between two files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx

from onnxcare import api
from onnxcare.case import Progress
from onnxcare.comparison import Diff, comparable, compare_answers, compare_files, tensor_changes
from onnxcare.graph.model import check_external_data, load_model
from onnxcare.graph.patch import check_output, publish, staged
from onnxcare.patchfile.apply import patched
from onnxcare.patchfile.format import read
from onnxcare.prepare import decision_of
from onnxcare.results import Applied
from onnxcare.runtime import few_blas_threads, resolve_device
from onnxcare.spec import load_spec


def apply(
    model: str | Path, patch: str | Path, out: str | Path, *, revert: bool = False, in_place: bool = False
) -> Applied:
    """Make the file that a patch was made for out of the other one.

    `apply(parent, patch, out)` writes the bytes that `fix` has written, and with `revert` what `fix` was given. Nothing
    is judged: fingerprints of both files make sure that it is these and no others.

    Args:
        model: the original; the repaired file where the patch is reverted.
        patch: a patch file, as `fix` writes it.
        out: where the other file goes; external data is copied beside it.
        revert: go back to the original.
        in_place: allow `out` to be the model itself.

    Raises:
        ModelError: the patch was made for another model, or external data is missing.
        DataError: the patch file is damaged, or of an unknown format.
        UsageError: the output cannot be written.
    """
    model, patch = Path(model), Path(patch)
    # Behind a link lies the file that is meant: replacing the link would leave it as it was.
    target = Path(out).resolve()
    check_output(Path(out), [patch], model, in_place)
    found = read(patch)
    loaded = load_model(model)
    data = patched(loaded, found, revert=revert)
    # What a repair has moved into the model lies in the original's sidecars still.
    original = replace(loaded, proto=onnx.ModelProto.FromString(data)) if revert else loaded
    check_external_data(model, original.proto)
    with staged(original, data, target) as path:
        made = load_model(path)
        changes = tensor_changes(loaded, made, {tensor.label for tensor in found.manifest.tensors})
        publish(original, path, data, target)
    return Applied(
        model=str(model), patch=str(patch), output=str(out), output_sha256=made.sha256, reverted=revert, tensors=changes
    )


@few_blas_threads()
def diff(
    model: str | Path,
    other: str | Path,
    *,
    data: str | Path | None = None,
    spec: str | Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    memory: str | None = None,
    progress: Progress = api.silent,
) -> Diff:
    """Show what differs between two model files, and in what they answer.

    Args:
        model: the one file.
        other: the other file; where answers are compared, it takes and gives the same.
        data: an npz file with arrays named like the model's inputs, or `x`, and labels if it has any.
        spec: a care.yaml: the judge measures its properties on both files, on the spec's held-out data. It also says
            how answers are read and what the labels of `data` are called.
        seed: takes the place of the spec's seed.
        device: `auto`, `cpu` or `cuda`.
        memory: bound on the memory of activations, such as `2GiB`; None means half of what is free.
        progress: told in a few words what is being done.

    Raises:
        OnnxcareError: a file cannot be used, or the models cannot be compared on data.
    """
    wanted = None if spec is None else load_spec(spec)
    chosen = resolve_device(device)
    progress("comparing the files")
    if data is None and spec is None:
        return compare_files(load_model(model), load_model(other))
    new, old = comparable(other, model, None if wanted is None else wanted.sample_axes)
    found = compare_files(old, new)
    if data is not None:
        progress(f"comparing answers on {data}")
        labels, output, decision = (
            ("y", None, None) if wanted is None else (wanted.labels, wanted.output, decision_of(wanted))
        )
        behaviour = compare_answers(old, new, Path(data), chosen, labels=labels, output=output, decision=decision)
        found = replace(found, behaviour=behaviour)
    if spec is not None:
        judged = api.check(other, spec, baseline=model, seed=seed, device=device, memory=memory, progress=progress)
        found = replace(found, check=judged)
    return found
