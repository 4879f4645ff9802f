"""The command line: parse, call the API, print, exit. Results go to standard output, everything else to standard error.

Exit codes: 0 repaired, passed or the same, 1 not repaired, a property fails or files differ, 2 wrong usage or spec,
3 model or data that cannot be used, 4 internal error, 5 workers lost, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxcare._version import __version__
from onnxcare.errors import ModelError, UsageError
from onnxcare.terminal import Commands, announce, console, status_line

if TYPE_CHECKING:
    from onnxcare.pool import Pool

# Kept here so that --help needs no heavy import; a test compares them with the registries.
METHODS = ("auto", "care", "ai-lancet-flip", "ai-lancet-finetune", "clp", "fine-pruning", "fine-tuning")
LOCATORS = ("auto", "causal", "interchange", "differential")
FORMATS = ("text", "json", "junit", "sarif")
INSPECT_FORMATS = ("text", "json")

# The package itself checks every path, so that the same fault has the same message and exit code everywhere.
_path = click.Path(path_type=Path, readable=False)
_model = click.argument("model", type=_path)
_spec = click.option("--spec", required=True, type=_path, help="What must not happen: a care.yaml.")
_seed = click.option("--seed", type=click.IntRange(1, 2**31 - 1), help="Takes the place of the spec's seed.")
_device = click.option(
    "--device",
    type=click.Choice(["auto", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="Where to run; auto takes CUDA where it works.",
)
_memory = click.option(
    "--memory", metavar="SIZE", help="Bound on activations, such as 2GiB [default: half of the free memory]."
)


_scheduler = click.option(
    "--scheduler", metavar="ADDRESS", help="Share the work with the workers of a dask scheduler, tcp://host:port."
)
_workers = click.option("--workers", metavar="N", type=click.IntRange(min=1), help="Or with N processes here.")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onnxcare")
def main() -> None:
    """Repair neural networks stored as ONNX files.

    onnxcare finds the hidden units that make a model misbehave, rewrites only the weights that carry it, and proves
    on held-out data that the misbehaviour is gone and nothing else broke.
    """


@main.command()
@_model
@_spec
@click.option("-o", "--output", type=_path, help="Where the repaired model goes.")
@click.option("--in-place", is_flag=True, help="Write over MODEL.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="auto",
    show_default=True,
    help="auto: a portfolio, best first; care: multipliers; ai-lancet-flip: voted weights change sign or become zero; "
    "ai-lancet-finetune: voted weights are tuned by gradient; clp: channels of outlying norm are pruned; "
    "fine-pruning: channels that sleep on clean samples are, and the rest is tuned on these; "
    "fine-tuning: all layers are tuned on clean samples.",
)
@click.option(
    "--locator",
    type=click.Choice(LOCATORS),
    default="auto",
    show_default=True,
    help="What care and ai-lancet go by; auto: what serves them best.",
)
@click.option(
    "--layers",
    metavar="NAME",
    multiple=True,
    help="Change this layer only, or those that a pattern such as 'block3*' matches; may be given several times.",
)
@click.option("--max-changed", metavar="N", type=click.IntRange(min=1), help="Change at most N values.")
@click.option("--best-effort", is_flag=True, help="Write the model even if the verdict is not good.")
@click.option("--patch", type=_path, help="Also write the repair as a patch file (.safetensors), see apply.")
@click.option("--json", "report", metavar="REPORT", help="Also write the whole result as JSON; - for standard output.")
@_seed
@_device
@_memory
@_scheduler
@_workers
@click.pass_context
def fix(
    context: click.Context,
    model: Path,
    spec: Path,
    output: Path | None,
    in_place: bool,
    method: str,
    locator: str,
    layers: tuple[str, ...],
    max_changed: int | None,
    best_effort: bool,
    patch: Path | None,
    report: str | None,
    seed: int | None,
    device: str,
    memory: str | None,
    scheduler: str | None,
    workers: int | None,
) -> None:
    """Repair MODEL and write it to OUTPUT if the judge is satisfied."""
    target = _target(output, model, in_place)
    if report not in (None, "-"):
        _check_report(Path(report), target, model, spec)
        if patch is not None and Path(report).resolve() == patch.resolve():
            raise UsageError(f"--json {report}: is the name of the patch file; name another file")
    from onnxcare import api
    from onnxcare.graph.patch import write_atomically
    from onnxcare.report import json, text

    announce(device)
    with status_line() as progress, _pool(scheduler, workers) as pool:
        result = api.fix(
            model,
            spec,
            target,
            method=method,
            locator=locator,
            layers=layers,
            max_changed=max_changed,
            seed=seed,
            device=device,
            memory=memory,
            in_place=in_place,
            best_effort=best_effort,
            patch=patch,
            pool=pool,
            progress=progress,
        )
    if report == "-":
        click.echo(json.render(result), nl=False)
    else:
        text.show_fix(result, console())
        if report is not None:
            write_atomically(Path(report), json.render(result))
    context.exit(result.exit_code)


@main.command()
@_model
@_spec
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="text",
    show_default=True,
    help="How to report; sarif is for code scanning, junit for CI servers.",
)
@click.option("-o", "--output", type=_path, help="Where the report goes [default: standard output].")
@click.option("--baseline", type=_path, help="A model to compare with, such as the one deployed at present.")
@_seed
@_device
@_memory
@click.pass_context
def check(
    context: click.Context,
    model: Path,
    spec: Path,
    form: str,
    output: Path | None,
    baseline: Path | None,
    seed: int | None,
    device: str,
    memory: str | None,
) -> None:
    """Measure every property and guard of MODEL, and look at its graph; nothing is changed.

    Ends with 0 if everything passes, and with 1 if something fails or cannot be decided.
    """
    if output == Path("-"):
        output = None
    if output is not None:
        _check_report(output, baseline or model, model, spec, "-o")
    from onnxcare import api
    from onnxcare.graph.patch import write_atomically
    from onnxcare.report import render_check, text

    announce(device)
    with status_line() as progress:
        result = api.check(model, spec, baseline=baseline, seed=seed, device=device, memory=memory, progress=progress)
    if output is not None:
        write_atomically(output, render_check(result, form))
    if form == "text" or output is not None:
        text.show_check(result, console())
    else:
        click.echo(render_check(result, form), nl=False)
    context.exit(result.exit_code)


@main.command()
@_model
@_spec
@click.option("--samples", type=click.IntRange(min=1), default=128, show_default=True, help="Samples per effect.")
@click.option("--values", type=click.IntRange(min=2), default=8, show_default=True, help="Values per unit.")
@click.option(
    "--method",
    type=click.Choice(LOCATORS),
    default="auto",
    show_default=True,
    help="causal: average causal effects; interchange: effects of the value without the cause; differential: votes, "
    "for single weights too; auto: what serves best.",
)
@click.option("--top", metavar="N", type=click.IntRange(min=1), default=10, show_default=True, help="Look for N units.")
@click.option(
    "--confidence",
    metavar="P",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="The probability with which none of them is missed.",
)
@click.option("--exact", is_flag=True, help="Measure all units on all samples with all values.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON.")
@_seed
@_device
@_memory
@_scheduler
@_workers
def locate(
    model: Path,
    spec: Path,
    samples: int,
    values: int,
    method: str,
    top: int,
    confidence: float,
    exact: bool,
    as_json: bool,
    seed: int | None,
    device: str,
    memory: str | None,
    scheduler: str | None,
    workers: int | None,
) -> None:
    """Rank the hidden units of MODEL by how much they carry the misbehaviour."""
    from onnxcare import api
    from onnxcare.report import json, text

    announce(device)
    with status_line() as progress, _pool(scheduler, workers) as pool:
        result = api.locate(
            model,
            spec,
            seed=seed,
            device=device,
            memory=memory,
            samples=samples,
            values=values,
            method=method,
            top=top,
            confidence=confidence,
            exact=exact,
            pool=pool,
            progress=progress,
        )
    if as_json:
        click.echo(json.render(result), nl=False)
    else:
        text.show_location(result, console())


@main.command()
@_model
@click.argument("patch", type=_path)
@click.option("-o", "--output", type=_path, help="Where the other file goes.")
@click.option("--in-place", is_flag=True, help="Write over MODEL.")
@click.option("--revert", is_flag=True, help="MODEL is the repaired file; write the original.")
def apply(model: Path, patch: Path, output: Path | None, in_place: bool, revert: bool) -> None:
    """Put the PATCH that fix has written on MODEL, or take it off; the bytes are those of the other file."""
    target = _target(output, model, in_place)
    from onnxcare import files
    from onnxcare.report.files import show_applied

    show_applied(files.apply(model, patch, target, revert=revert, in_place=in_place), console())


@main.command()
@_model
@click.argument("other", type=_path)
@click.option("--data", type=_path, help="An npz file on which answers are compared.")
@click.option("--spec", type=_path, help="A care.yaml that the judge measures both files by.")
@click.option(
    "--format", "form", type=click.Choice(("text", "json")), default="text", show_default=True, help="How to report."
)
@_seed
@_device
@_memory
@click.pass_context
def diff(
    context: click.Context,
    model: Path,
    other: Path,
    data: Path | None,
    spec: Path | None,
    form: str,
    seed: int | None,
    device: str,
    memory: str | None,
) -> None:
    """Show what differs between MODEL and OTHER: tensors, other parts, and answers on data.

    Ends with 0 if both hold the same, and with 1 if they differ.
    """
    from onnxcare import files
    from onnxcare.report import json
    from onnxcare.report.files import show_diff

    if data is not None or spec is not None:
        announce(device)
    with status_line() as progress:
        result = files.diff(
            model, other, data=data, spec=spec, seed=seed, device=device, memory=memory, progress=progress
        )
    if form == "json":
        click.echo(json.render(result), nl=False)
    else:
        show_diff(result, console())
    context.exit(result.exit_code)


@main.command()
@_model
@click.option(
    "--format",
    "form",
    type=click.Choice(INSPECT_FORMATS),
    default="text",
    show_default=True,
    help="How to show it.",
)
@click.option("--picture", metavar="GRAPH.svg", type=_path, help="Also draw the graph into this file.")
def inspect(model: Path, form: str, picture: Path | None) -> None:
    """Show what MODEL consists of, what can be repaired by which method and what not, and why."""
    from onnxcare import api
    from onnxcare.report import inspection, json

    result = api.inspect(model, picture=picture)
    if form == "json":
        click.echo(json.render_inspection(result), nl=False)
    else:
        inspection.show_inspection(result, console())


@main.command()
@click.option("-o", "--output", type=_path, help="Where the repaired model goes [default: a new folder].")
@_device
@click.pass_context
def demo(context: click.Context, output: Path | None, device: str) -> None:
    """Take a backdoor out of the sample model that ships with onnxcare."""
    from onnxcare.demo import sample

    folder = sample()
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    target = output or Path(tempfile.mkdtemp(prefix="onnxcare-demo-")) / "repaired.onnx"
    command = f"onnxcare fix {folder / 'model.onnx'} --spec {folder / 'care.yaml'} -o {target}"
    click.echo(f"$ {command}", err=True)
    context.invoke(
        fix,
        model=folder / "model.onnx",
        spec=folder / "care.yaml",
        output=target,
        in_place=False,
        method="auto",
        locator="auto",
        layers=(),
        max_changed=None,
        best_effort=False,
        patch=None,
        report=None,
        seed=None,
        device=device,
        memory=None,
        scheduler=None,
        workers=None,
    )


def _target(output: Path | None, model: Path, in_place: bool) -> Path:
    """Return where a file goes that may take the place of the model."""
    if (output is None) == (not in_place):
        raise click.UsageError("give either -o OUTPUT or --in-place")
    return output if output is not None else model


def _check_report(report: Path, output: Path, model: Path, spec: Path, flag: str = "--json") -> None:
    """Make sure, before any work is done, that the report can be written and overwrites nothing of this run."""
    from onnxcare.graph.patch import check_output
    from onnxcare.spec import load_spec

    if report.resolve() == output.resolve():
        raise UsageError(f"{flag} {report}: is the name of a model of this run; name another file")
    taken = [model, spec, *load_spec(spec).files()]
    if report.is_file():
        taken += [*_sidecars(model), *_sidecars(output)]
    check_output(report, taken, model, in_place=False)


def _sidecars(model: Path) -> tuple[Path, ...]:
    """Return the files that hold a model's external data, none where it cannot be read anyway."""
    from onnxcare.graph.model import load_model

    try:
        return load_model(model).external_files()
    except ModelError:
        return ()


@contextlib.contextmanager
def _pool(scheduler: str | None, workers: int | None) -> Iterator[Pool | None]:
    """Yield who shares the work, None where nobody does."""
    if scheduler is not None and workers is not None:
        raise UsageError("give either --scheduler or --workers")
    if scheduler is None and workers is None:
        yield None
        return
    from onnxcare import cluster

    with cluster.connect(scheduler) if scheduler is not None else cluster.start(workers or 1) as pool:
        yield pool


if __name__ == "__main__":
    main()
