"""The sections of a run's report. One that the run's data cannot give is a line with a command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.reporting import tables
from experiments.reporting.bound_page import bits_per_t, coding
from experiments.reporting.html import (
    Html,
    data,
    el,
    grid_png,
    join,
    picture,
    slider,
)
from experiments.reporting.plots import Axis, Choice, Plot, curve
from experiments.reporting.reading import PATH_STUDY, Frames, Result, RunData, Study
from experiments.reporting.sections import Missing, Page, Section

CODING_STUDY = "progressive_coding"
# The experiments of a run, in the report's order, and what each shows.
STUDIES = {
    CODING_STUDY: "rate and distortion over the reverse process",
    PATH_STUDY: "x̂_0 over time",
    "interpolation": "interpolations between test images",
    "nearest_neighbors": "samples with their nearest training images",
    "sample_quality": "sample quality with its protocol",
    "fixed_variance_cost": "what the fixed choices of Σ cost, for each t",
    "autoregressive": "an autoregressive model as a diffusion that masks coordinates",
}
BITS = ("bits_per_dim_test", "bits_per_dim_train", "bits_per_dim_")
# The nearest to the paper's FID first.
QUALITY = ("fid50k", "fd_inception", "fd_effnet", "kd_inception", "kd_effnet", "fd_pixels", "kd_")
FREE = (
    ".batch_size",
    "_dir",
    ".resident_bytes",
    ".cache_bytes",
    ".metrics",
    ".split",
    ".weights",
    ".statistics",
)
LONG_PROTOCOL = 400  # Letters; a longer one is folded.
FRAME_BYTES = 12 * 2**20  # Of x̂_0 before compression; what is beyond is thinned out.


def run_page(run: RunData) -> Page:
    """The report of a run."""
    parts: list[Section | Missing] = [
        training(run),
        samples(run),
        evaluation(run),
        bits_per_t(run),
        *studies(run),
        Section("config", "Config", tables.config(tables.all_values(run.config))),
        Section("provenance", "Provenance", tables.provenance(run)),
    ]
    return Page(
        run.directory.path.name,
        description(run),
        tiles(run),
        [part for part in parts if isinstance(part, Section)],
        [part for part in parts if isinstance(part, Missing)],
    )


def description(run: RunData) -> str:
    """The run in a line: data, network, the three choices, steps."""
    c = run.config
    size, widths = c.data.image_size, ", ".join(map(str, c.model.channel_multipliers))
    return (
        f"{c.data.name}/{c.data.split}, {size}×{size}×{c.data.channels} · U-Net of "
        f"{c.model.channels} × ({widths}) channels · prediction {c.diffusion.prediction}, variance "
        f"{c.diffusion.variance}, objective {c.train.objective} · {c.diffusion.schedule} schedule, "
        f"T = {c.diffusion.num_steps:,}"
    )


def tiles(run: RunData) -> list[tuple[str, str]]:
    """(label, value): how far the training is, and the numbers that matter most."""
    found = [("step", f"{run.step:,} of {run.config.train.steps:,}")]
    losses = [r["loss"] for r in run.records if "loss" in r]
    found.append(("training loss", f"{losses[-1]:.4g}"))
    for starts in (BITS, QUALITY):
        if r := main_result(run, starts):
            unlike = tables.words(_changed(r, run))
            found.append((", ".join([r.name, *unlike]), r.manifest.measured.text()))
    return found


def main_result(run: RunData, starts: Sequence[str]) -> Result | None:
    """The newest result of the first of these names that is there; the config's own before others.

    Args:
      starts: of the names, those that are wanted most first.
    """
    for start in starts:
        found = [r for r in run.results if r.name.startswith(start)]
        if found:
            return max(
                found,
                key=lambda r: (not _changed(r, run), r.step, r.manifest.provenance["time"]),
            )
    return None


def _changed(result: Result, run: RunData) -> dict[str, object]:
    """{key: value} with which it was measured, of those that its protocol may depend on."""
    changed = tables.unlike(result.manifest.subject, run.config)
    groups = ("data", "diffusion", "evaluation", "sample")
    return {
        key: value
        for key, value in changed.items()
        if key.partition(".")[0] in groups and not key.endswith(FREE)
    }


def training(run: RunData) -> Section:
    """The curves of metrics.jsonl."""
    lines = [r for r in run.records if "loss" in r]
    positive = all(r["loss"] > 0 for r in lines)
    losses = [curve(lines, "loss", "all t")]
    for quarter in range(1, 5):
        key = f"loss_quarter_{quarter}"
        if any(key in r for r in lines):
            losses.append(curve(lines, key, f"quarter {quarter}", color=quarter, faint=True))
    step = Axis("step")
    figures = [
        Plot(
            "loss",
            "Loss",
            f"It goes from {lines[0]['loss']:.3g} at step {lines[0]['step']:,} to "
            f"{lines[-1]['loss']:.3g} at step {lines[-1]['step']:,}.",
            step,
            [Choice("loss", Axis(f"loss ({run.config.train.objective})", positive), losses)],
            note="Means over the steps between lines of metrics.jsonl; quarters: of t from 1 to T.",
        )
    ]
    shown = {"step", *(k for r in lines for k in r if k.startswith("loss"))}
    others = [k for k in dict.fromkeys(k for r in lines for k in r) if k not in shown]
    if times := [key for key in others if key.startswith("time/")]:
        choices = [Choice(key[5:], Axis(key[5:]), [curve(lines, key)]) for key in times]
        text = "Seconds of each phase over all starts, the share of steps, and of single steps."
        figures.append(Plot("training-time", "Where the time went", text, step, choices))
    for key in [key for key in others if key not in times]:
        if key == "images_per_second":  # Steps a second times the batch size.
            continue
        title = key.replace("_", " ").capitalize()
        last = next(r[key] for r in reversed(lines) if key in r)
        choice = Choice(key, Axis(""), [curve(lines, key)])
        name = "training-" + re.sub(r"\W+", "-", key)
        figures.append(Plot(name, title, f"It ends at {last:.4g}.", step, [choice]))
    found = [el("div", *(p.html() for p in figures), class_="plots")]
    evaluated = [r for r in run.records if "loss" not in r]
    keys = dict.fromkeys(k for r in evaluated for k in r if k != "step" and k[-6:] != "_error")
    if keys:
        choices = [
            Choice(k, Axis(k), [curve(evaluated, k, kind="both")])
            for k in sorted(keys, key=lambda k: (not k.startswith("bits_per_dim"), k))
        ]
        plot = Plot(
            "evaluated",
            "Evaluation while training",
            "Results of train.evaluate_every over the steps, with their standard errors.",
            step,
            choices,
            choose="Result",
            note="Bars are one standard error to both sides.",
        )
        found.append(plot.html())
    return Section("training", "Training", join(found))


def samples(run: RunData) -> Section | Missing:
    """The grids of samples: those of the training over its steps, and the newest drawn after."""
    found = []
    ended = run.config.train.steps in run.grids  # A grid is drawn there when all is trained.
    if len(run.grids) > 1:
        frames = [(f"step {step:,}", png) for step, png in run.grids.items()]
        alt = "Grid of samples drawn during training"
        shown = slider(frames, "Drawn at", alt, len(frames) - 1, "training-samples")
        some = run.grids_there > len(frames) and el(
            "p", f"{len(frames)} of {run.grids_there:,} grids.", class_="note"
        )
        found.append(join([el("h3", "During training"), shown, some]))
    elif run.grids:
        ((step, png),) = run.grids.items()
        alt = f"Grid of samples drawn at step {step:,}"
        end = ", at the end of training" if ended else ""
        found.append(picture(png, alt, f"Drawn at step {step:,}{end}.", True))
    if run.drawn:
        drawn = run.drawn
        caption = join([el("code", drawn.name), ": " * bool(drawn.protocol), _how(drawn.protocol)])
        shown = picture(drawn.png, "Grid of the newest samples", caption, True)
        found.append(join([el("h3", "Newest"), shown]))
    if PATH_STUDY not in run.studies and run.training:
        alt = "The training loss, and x̂_0 over the reverse process for a few samples"
        end = "the end of training" if ended else "an earlier end of training"
        found.append(picture(run.training, alt, f"x̂_0 at {end}"))
    if not found:
        what = f"python -m ddpm_jax.main --mode=sample --workdir={shlex.quote(run.shown)}"
        return Missing("samples", what)
    return Section("samples", "Samples", el("div", *(el("div", f) for f in found), class_="side"))


def _how(protocol: Mapping[str, object]) -> str:
    """How samples were drawn; the run's config says of what model."""
    kept = ("checkpoint", "parameters", "sampler", "steps", "eta", "clip", "seed", "count")
    return "; ".join(tables.words({k: protocol[k] for k in kept if k in protocol}))


def path(run: RunData) -> Html | None:
    """x̂_0 over the reverse process, with a slider."""
    if run.path is None:
        return None
    frames, note = within_budget(run.path)
    shown = [
        (f"t = {t:,}", grid_png(images))
        for t, images in zip(frames.times, frames.frames, strict=True)
    ]
    alt = "Grid of x̂_0, the samples that the network expects"
    return join([slider(shown, "x̂_0 at", alt, 0, "x0-path"), el("p", note, class_="note")])


def within_budget(path: Frames) -> tuple[Frames, str]:
    """As many samples and times as the page bears, and a sentence that says how many."""
    times, count = path.frames.shape[:2]
    one = max(1, path.frames[0, 0].nbytes)
    kept = min(count, 64, max(4, FRAME_BYTES // (one * times)))
    steps = min(times, max(12, FRAME_BYTES // (one * kept)))
    chosen = np.linspace(0, times - 1, steps).round().astype(int)
    thin = Frames(path.frames[chosen][:, :kept], [path.times[k] for k in chosen])
    return thin, (
        f"{kept} of {count} samples at {steps} of {times} times, from noise (t = "
        f"{path.times[0]:,}) to the samples (t = {path.times[-1]:,})."
    )


def evaluation(run: RunData) -> Section | Missing:
    """Every result with its error and protocol, and the pictures kept beside results."""
    if not run.results:
        what = f"python -m ddpm_jax.main --mode=evaluate --workdir={shlex.quote(run.shown)}"
        return Missing("bits/dim and the quality of samples", what)
    found = tables.results(run.results)
    for r in run.results:
        title = f"{r.name} at step {r.step:,}"
        if r.picture and r.name.startswith("nearest"):
            alt = "Samples in the upper row, each above its nearest training image"
            caption = f"{title}: samples above their nearest images"
            found.append(picture(r.picture, alt, caption, True))
        elif r.picture:
            found.append(picture(r.picture, title, title))
    return Section("evaluation", "Evaluation", join(found))


def studies(run: RunData) -> list[Section | Missing]:
    """A section a study, in the order of STUDIES, others after them."""
    order = [*STUDIES, *sorted(set(run.studies) - set(STUDIES))]
    more = {CODING_STUDY: coding(run.studies.get(CODING_STUDY)), PATH_STUDY: path(run)}
    found: list[Section | Missing] = []
    for name in order:
        if name in run.studies:
            found.append(_study(run, run.studies[name], more.get(name)))
        else:
            what = f"python -m experiments.{name} --run={shlex.quote(run.shown)}"
            found.append(Missing(STUDIES[name], what))
    return found


def _study(run: RunData, study: Study, more: Html | None) -> Section:
    alt = f"{study.title}. {' '.join(study.notes)}".strip()
    shown = el("ul", *(el("li", note) for note in study.notes)) if study.notes else None
    step, unlike = study.subject.get("checkpoint"), tables.unlike(study.subject, run.config)
    how = [f"Made at step {step:,}."] if isinstance(step, int) else []
    if unlike:
        how.append(f"Other than in the run's config: {'; '.join(tables.words(unlike))}.")
    protocol = el("p", "Protocol: ", "; ".join(tables.words(study.protocol)), class_="note")
    if len(protocol) > LONG_PROTOCOL:
        protocol = el("details", el("summary", "Protocol"), protocol, class_="data")
    body = [
        more,
        picture(study.figure, alt),
        shown,
        el("p", " ".join(how), class_="note") if how else None,
        protocol if study.protocol else None,
        data(study.table, study.title, f"{study.name}.csv", "Table"),
    ]
    return Section(f"study-{study.name}", study.title, join(body))
