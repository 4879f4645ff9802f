"""What the command line says on a terminal, and how it ends: errors in one line, progress, exit codes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from onnxcare.errors import OnnxcareError

if TYPE_CHECKING:
    from rich.console import Console


class Commands(click.Group):
    """Explains errors in one line and gives each kind its exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command and end the process."""
        if not sys.warnoptions:
            warnings.simplefilter("ignore")  # such as numpy's, on candidates that overflow
        # Python has none where a shell closed them (>&-): what is printed is meant for nobody then.
        sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
        try:
            # click hands back the exit code; python -m would drop it.
            sys.exit(super().main(*args, **{**kwargs, "standalone_mode": False}))
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except OnnxcareError as error:
            _complain(str(error), error)
            sys.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            _complain("interrupted; no half-written file is left")
            sys.exit(130)
        except MemoryError as error:
            what = str(error) or "an array does not fit"
            _complain(f"not enough memory: {what}; give less data, or fewer samples", error)
            sys.exit(3)
        except OSError as error:
            # A full disk behind standard output, a name too long and the like; click itself sees to broken pipes.
            _complain(str(error), error)
            sys.exit(2)
        except Exception as error:
            _complain(
                f"internal error: {type(error).__name__}: {error}; please report it "
                "(ONNXCARE_TRACEBACK=1 shows where it happened)",
                error,
            )
            sys.exit(4)


def _complain(text: str, error: BaseException | None = None) -> None:
    if error is not None and os.environ.get("ONNXCARE_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    click.echo(f"onnxcare: {text}", err=True)


def announce(device: str) -> None:
    """Say in one line what `auto` took."""
    if device != "auto":
        return
    from onnxcare.runtime import resolve_device

    why = "onnxruntime can use a GPU" if resolve_device(device) == "cuda" else "no GPU that onnxruntime can use"
    click.echo(f"onnxcare: device {resolve_device(device)} ({why})", err=True)


def console() -> Console:
    """Return where results are printed."""
    from rich.console import Console

    # Tables in a log or a pipe should not be folded at 80 columns.
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Show what is being done while standard error is a terminal; nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(text.replace("[", r"\["))
