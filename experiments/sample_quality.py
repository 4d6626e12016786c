"""Table 1 and the grids beside it: samples, and every number of the run with its protocol.

    python -m experiments.sample_quality --run=runs/digits
    python -m experiments.sample_quality --run=runs/cifar10 --config.evaluation.weights=PATH

Writes sample_quality.png, .csv, .md and .json into the run's figures/: the first samples, not
selected, beside real images, and a table of the results in the run's evaluation/ that are of these
parameters, each with its standard error and, in words, the protocol it was measured under. What
`evaluation.metrics` asks for and is not there is measured first, as --mode=evaluate does.

How to read it. "real" is the same for as many held-out images instead of samples: what a perfect
model would get. Fréchet distances depend on the number of images; where there are fewer held-out
images than samples, as many of the samples have a line of their own. "paper" is Table 1, where
data, prediction, objective and protocol are the paper's. out_of_range is the share of the
samples' values that were rounded from outside [−1, 1].

Samples are the largest set in the run's samples/ that was drawn from the same parameters. Where
there is none they are drawn, with a chain of 100 steps unless --config.sample.steps says otherwise
or the paper's 50,000 in Inception's features are asked for. For results of the whole chain run
--mode=evaluate first, or set --config.sample.steps to T.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ddpm_jax import figures, files, generation
from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import names, reference, requests
from ddpm_jax.evaluation.drawing import Drawer
from ddpm_jax.evaluation.results import evaluate
from experiments import common, quality_table
from experiments.common import Study
from experiments.quality_table import Row
from experiments.sample_sets import drawn_by, held_out_split

# In the picture, in inches: a line of text, a grid, the whole, and where the columns are.
LINE, GRID, WIDTH = 0.25, 5.4, 11.6
PLACES = {"result": 0.1, "value": 3.2, "real images": 6.2, "paper": 9.0, "protocol": 10.6}


def work(study: Study) -> None:
    """Makes the figure and the table."""
    count, e = study.flags.count, study.run.config.evaluation
    if count < 1:
        raise RequestError(f"--count={count}: at least 1 image is needed in the grid")
    source = requests.open_split(study.run.config, e.reference, "evaluation.reference")
    held_out = held_out_split(study)
    of_samples = any(names.parse(metric)[1] for metric in e.metrics)
    paper_s = of_samples and e.count == names.PAPER_COUNT
    run = drawn_by(
        study, e.count if of_samples else 0, max(count, 2), shorten=not paper_s, exactly=paper_s
    )
    run.config.evaluation.count = run.config.sample.count
    # The seed of the samples there may be another than the one that the bound is asked for with.
    for measured, own in ((study.run, False), (run, True)):
        config = copy.deepcopy(measured.config)
        config.evaluation.metrics = [m for m in e.metrics if bool(names.parse(m)[1]) == own]
        evaluate(dataclasses.replace(measured, config=config), study.directory, study.say)
    images, outside = Drawer(study.say)(run, study.directory, None)
    rows = quality_table.table(study, run, images, outside, source, held_out)
    title = f"{study.directory.path.name}, step {run.step}: samples and their quality"
    text = quality_table.markdown(title, rows)
    shown = images[:count]
    real = source.images(reference.evenly(len(source), min(count, len(source))))
    picture = common.to_png(draw(shown, real, rows, f"{source.name}/{source.split}"))
    files.replace(study.directory.figures / f"{study.name}.md", text)
    study.save(
        title,
        picture,
        [row.columns() for row in rows],
        {
            "samples": generation.sampling_protocol(run),
            "results": [row.file for row in rows if row.file],
        },
        [
            f"{len(shown)} samples, the first drawn, beside {len(real)} images of {source.split}; "
            f"the table is in {study.name}.md too, to be pasted.",
            *(f"{row.result}: {row.measured.text()} ({row.protocol})." for row in rows[-1:]),
        ],
    )


def draw(samples: np.ndarray, real: np.ndarray, rows: Sequence[Row], split: str) -> Any:
    """The figure: grids of samples and of real images, and below them the table.

    Args:
      samples, real: uint8 [n, h, w, c].
      split: what the real images are of.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, GRID + LINE * (_lines(rows) + 2)))
    height = figure.get_figheight()
    for side, (title, images) in enumerate({"samples": samples, split: real}.items()):
        left, bottom, width = 0.1 + side * WIDTH / 2, height - GRID - 0.4, WIDTH / 2 - 0.2
        place = (left / WIDTH, bottom / height, width / WIDTH, GRID / height)
        axes = figure.add_axes(place)
        picture = figures.grid(images)
        grey = picture.shape[-1] == 1
        axes.imshow(
            picture[..., 0] if grey else picture,
            cmap="gray" if grey else None,
            vmin=0,
            vmax=255,
            interpolation="nearest",
        )
        axes.set_title(title, fontsize=14)
        axes.axis("off")
    _draw_table(figure.add_axes((0, 0, 1, 1 - (GRID + 0.5) / height)), rows)
    return figure


def _wrapped(rows: Sequence[Row]) -> list[str]:
    notes = (f"[{k}] {text}" for k, text in enumerate(quality_table.protocols(rows), 1))
    return [line for text in notes for line in textwrap.wrap(text, 150, subsequent_indent="     ")]


def _lines(rows: Sequence[Row]) -> float:
    return len(rows) + len(_wrapped(rows)) + 2.5


def _draw_table(axes: Any, rows: Sequence[Row]) -> None:
    axes.set(xlim=(0, WIDTH), ylim=(_lines(rows), 0))
    axes.axis("off")
    heads, notes = quality_table.columns(rows), quality_table.protocols(rows)
    for head in heads:
        axes.text(PLACES[head], 0.8, head, fontsize=11, weight="bold")
    axes.plot((0.1, WIDTH - 0.1), (1.1, 1.1), color="black", lw=1)
    for line, row in enumerate(rows):
        for head, text in zip(heads, quality_table.cells(row, heads, notes), strict=True):
            shown = f"[{text}]" if head == "protocol" else text
            axes.text(PLACES[head], line + 1.9, shown, fontsize=11)
    for line, text in enumerate(_wrapped(rows), len(rows)):
        axes.text(0.1, line + 2.4, text, fontsize=10)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The experiment's own flags."""
    parser.add_argument("--count", type=int, default=64, help="images in each grid, at most")


main: Callable[..., int] = functools.partial(
    common.main, "sample_quality", __doc__, work, add_flags=add_flags
)

if __name__ == "__main__":
    sys.exit(main())
