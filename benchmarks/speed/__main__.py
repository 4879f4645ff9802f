"""The command line: choose the rows, run them, and show and save what they found."""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
import traceback
from pathlib import Path

import benchmarks.speed
from benchmarks.speed import machine

RESULTS = Path(__file__).parents[1] / "results" / "speed.json"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=benchmarks.speed.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="rows whose names start so [default: all]"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see whether everything runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=machine.cores(), metavar="N", help="[default: all cores]")
    parser.add_argument("--padding", choices=["valid", "alternating"], default="valid", help="of the large CNN")
    parser.add_argument("--patience", type=int, default=600, metavar="S", help="for each command of the row memory")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="the chart goes beside it, as SVG")
    return parser.parse_args()


def main() -> int:
    """Run the rows; return 1 if one failed or if the two sides of one did not compute the same."""
    arguments = _arguments()
    # Libraries count the cores when they are loaded, so that everything else is imported afterwards.
    machine.restrict(arguments.threads)
    from benchmarks.speed import effects, report, resources, search
    from benchmarks.speed.measure import Result, Setting

    machine.settle(arguments.threads)
    rows = effects.ROWS | search.ROWS | resources.ROWS
    chosen = [name for name in rows if not arguments.only or name.startswith(tuple(arguments.only))]
    if not chosen:
        print(f"no row is called so; there are {', '.join(rows)}", file=sys.stderr)
        return 2
    results: list[Result] = []
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            device=arguments.device,
            threads=arguments.threads,
            quick=arguments.quick,
            padding=arguments.padding,
            folder=Path(folder),
            patience=arguments.patience,
        )
        header = machine.header(setting) | {"date": datetime.date.today().isoformat()}
        others = machine.Others()
        setting.say(", ".join(f"{key} {value}" for key, value in header.items()))
        for name in chosen:
            started = time.monotonic()
            try:
                results += rows[name](setting)
            except Exception:
                traceback.print_exc()
                failed = True
            setting.say(f"{name}: done after {time.monotonic() - started:.1f} s")
    header["others_cores"] = round(others.cores(), 2)
    report.show(results, header)
    report.save(results, header, arguments.json)
    return int(failed or any(result.differs for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
