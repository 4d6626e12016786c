"""One page to look at: everything that a run, or a sweep, has to show, in a single HTML file.

    pip install -e '.[report]'
    python -m experiments.report --run=runs/digits
    python -m experiments.report --sweep=runs/table2

Writes report.html into the directory, or --out. The file needs no network and nothing beside it.
Of a run it shows: training curves, samples, x̂_0 with a slider over time, every result with its
protocol, bits per t, each study of figures/ with its picture and table, the config, and what the
training ran with. Of a sweep: the table and figure, each result over the cells, all training curves
and samples beside each other, what the configs have in common, what the trainings ran with, and
links to those runs that have a report of their own.

Plots are zoomed with the mouse or the buttons above them (arrow keys go from button to button); the
numbers behind each are in the table below it. What the directory cannot give is named at the end
with the command that makes it. Nothing is computed: the report reads files.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence

from etils import epath

import ddpm_jax
from ddpm_jax import files
from ddpm_jax.config import RequestError
from ddpm_jax.main import Parser, reported
from ddpm_jax.runs import RunDirectory
from experiments.reporting import page as page_lib
from experiments.reporting.reading import read_run
from experiments.reporting.run_page import run_page
from experiments.reporting.sweep_page import sweep_page
from experiments.reporting.sweep_reading import is_sweep, read_sweep


def write(shown: str, out: str | None = None, sweep: bool = False) -> epath.Path:
    """Writes the report of a directory, and returns its file.

    Args:
      shown: the directory, as the user named it.
      out: the file; report.html in the directory, unless given.
      sweep: whether it must be that of a sweep; otherwise that is seen from its files.
    Raises:
      RequestError: nothing to report on, a damaged file, or plotly is missing; nothing is written.
    """
    plotly = page_lib.plotly_js()
    directory = RunDirectory.of(shown).path
    try:
        target = epath.Path(out).expanduser() if out else directory / "report.html"
        if target.is_dir():
            raise RequestError(f"--out={out} is a directory; name a file, e.g. {out}/report.html")
    except ImportError:
        raise RequestError(
            f"--out={out}: gs:// paths need gcsfs: pip install 'ddpm_jax[gcs]'"
        ) from None
    whole = sweep or is_sweep(shown)
    page = sweep_page(read_sweep(shown), target) if whole else run_page(read_run(shown))
    now = datetime.datetime.now(datetime.UTC).isoformat(" ", "minutes").removesuffix("+00:00")
    made = f"Made {now} UTC by ddpm_jax {ddpm_jax.__version__} of {shown}."
    files.replace(target, page_lib.render(page, plotly, made))
    return target


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see `ddpm_jax.main`."""

    def whole() -> int:
        parser = Parser(
            prog="python -m experiments.report",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        which = parser.add_mutually_exclusive_group(required=True)
        which.add_argument("--run", help="the directory of a run, or of a sweep")
        which.add_argument("--sweep", help="the directory of a sweep")
        parser.add_argument("--out", help="the file; report.html in the directory, unless given")
        flags = parser.parse_args(argv)
        target = write(flags.sweep or flags.run, flags.out, bool(flags.sweep))
        print(f"{target} ({target.stat().length / 2**20:.1f} MB): open it in a browser")
        return 0

    return reported(whole)


if __name__ == "__main__":
    sys.exit(main())
