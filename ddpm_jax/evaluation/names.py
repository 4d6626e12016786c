"""What a metric may be called in the config, and what its result is called.

A request is `bits_per_dim`, or `<metric>_<features>` such as kd_effnetlite0_64, fd_pixels or
is_inception; `fid` and `is` are short for the paper's, fd_inception and is_inception. A result's
name also tells the split (bits_per_dim_test) or the number of samples (kd_effnetlite0_64_5k). Only
50,000 samples with the 2015 Inception network make a `fid50k_inception` or an `is50k_inception`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import ml_collections

BOUND = "bits_per_dim"
BOUND_RESULTS = (BOUND, "rate", "distortion", "rmse", "prior")
ALIASES = {"fid": "fd_inception", "is": "is_inception", "kid": "kd_inception"}
FEATURES = r"inception|pixels|effnetlite0_\d+"
PAPER_COUNT = 50_000


class Kind(NamedTuple):
    """A sample-quality metric: the names of its values, whether less is better, and its unit."""

    values: tuple[str, ...]
    better: str
    unit: str = ""


KINDS = {
    "fd": Kind(("fd",), "lower"),
    "kd": Kind(("kd",), "lower"),
    "is": Kind(("is",), "higher"),
    "prdc": Kind(("precision", "recall", "density", "coverage"), "higher"),
    "fdinf": Kind(("fdinf",), "lower"),
    "nearest": Kind(("nearest",), "", "RMS a feature"),
}


def parse(name: str) -> tuple[str, str]:
    """(metric, features) of a request; (bits_per_dim, "") for the bound.

    Raises:
      ValueError: no such metric; the known ones are listed.
    """
    if name == BOUND:
        return BOUND, ""
    match = re.fullmatch(rf"({'|'.join(KINDS)})_({FEATURES})", ALIASES.get(name, name))
    if not match:
        raise ValueError(
            f"evaluation.metrics={name}: no such metric; choose {BOUND}, {', '.join(ALIASES)}, or "
            f"one of {', '.join(KINDS)} with its features, such as fd_pixels, kd_effnetlite0_64 or "
            "prdc_inception"
        )
    if match[1] == "is" and match[2] == "pixels":
        raise ValueError(
            f"evaluation.metrics={name}: an Inception score needs a classifier, pixels are none"
        )
    return match[1], match[2]


def quality_name(value: str, features: str, count: int) -> str:
    """The name of a sample-quality result, e.g. kd_effnetlite0_64_5k."""
    if features == "inception" and count == PAPER_COUNT and value in ("fd", "is"):
        return {"fd": "fid50k_inception", "is": "is50k_inception"}[value]
    return f"{value}_{features}_{short_count(count)}"


def short_count(count: int) -> str:
    """5000 as 5k, 1234 as itself."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def results(metrics: tuple[str, ...], splits: tuple[str, ...], count: int) -> dict[str, Kind]:
    """The names of all results of a request, with what is better in each."""
    found = {}
    for metric, features in map(parse, metrics):
        if metric == BOUND:
            units = dict.fromkeys(BOUND_RESULTS, "bits/dim") | {"rmse": "RMSE on 0–255"}
            for split in splits:
                better = dict.fromkeys(BOUND_RESULTS, "lower") | {"prior": ""}
                found |= {f"{v}_{split}": Kind((v,), better[v], units[v]) for v in BOUND_RESULTS}
            continue
        kind = KINDS[metric]
        found |= {quality_name(v, features, count): kind for v in kind.values}
    return found


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the values of `config.evaluation` against each other.

    Raises:
      ValueError: one line that begins with the key.
    """
    e, num_steps = config.evaluation, config.diffusion.num_steps
    if not e.metrics:
        raise ValueError("evaluation.metrics is empty: name at least one metric")
    results(e.metrics, e.split, e.count)
    if BOUND in e.metrics and not e.split:
        raise ValueError("evaluation.split is empty: name at least one split, e.g. test")
    chain = e.steps or num_steps
    if chain > num_steps:
        raise ValueError(f"evaluation.steps={e.steps} is more than diffusion.num_steps={num_steps}")
    if e.terms == 1 and chain > 1:
        raise ValueError("evaluation.terms=1: one is always the decoder's; choose 2 or more")
    if chain < num_steps and config.diffusion.variance == "learned":
        raise ValueError(
            "evaluation.steps: diffusion.variance=learned is the variance of single steps, "
            "wrong for longer ones; choose learned_range, or all the steps"
        )
    if e.checkpoint not in ("newest", "best") and not re.fullmatch("[0-9]+", e.checkpoint):
        raise ValueError(
            f"evaluation.checkpoint={e.checkpoint}: choose newest, best, or a step's number"
        )


def check_keep_best(config: ml_collections.ConfigDict) -> None:
    """Checks that training with this config measures the result that `train.keep_best` names.

    Raises:
      ValueError: one line that begins with the key.
    """
    e = config.evaluation
    found = results(e.metrics, e.split, e.count)
    best = config.train.keep_best
    if best and not config.train.evaluate_every:
        raise ValueError(
            f"train.keep_best={best} needs train.evaluate_every, the steps between evaluations"
        )
    if best and not (best in found and found[best].better):
        known = [name for name, kind in found.items() if kind.better]
        raise ValueError(
            f"train.keep_best={best}: choose a result of evaluation.metrics: {', '.join(known)}"
        )
