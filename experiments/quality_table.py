"""A run's results as a table: each with its protocol in words, real images' and the paper's beside.

See `sample_quality`, which writes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_jax import files, generation
from ddpm_jax.config import RequestError
from ddpm_jax.data import Source
from ddpm_jax.evaluation import manifest, names, quality, reference
from ddpm_jax.evaluation.features import make_extractor
from ddpm_jax.evaluation.manifest import Manifest, Measured
from ddpm_jax.runs import Run, fingerprint
from experiments.common import Study, has_paper_s_chain
from experiments.sample_sets import Space

# Table 1, by prediction and objective.
PAPER = {
    ("eps", "simple"): {
        "is50k_inception": "9.46 ± 0.11",
        "fid50k_inception": "3.17",
        "bits_per_dim_test": "≤ 3.75",
        "bits_per_dim_train": "≤ 3.72",
    },
    ("eps", "vlb"): {
        "is50k_inception": "7.67 ± 0.13",
        "fid50k_inception": "13.51",
        "bits_per_dim_test": "≤ 3.70",
        "bits_per_dim_train": "≤ 3.69",
    },
}
PARAMETERS = {"ema": "the parameters' moving average", "raw": "the parameters themselves"}
VALUES = [value for kind in names.KINDS.values() for value in kind.values]


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    protocol: in words. real: the same of held-out images. paper: as the paper writes it.
    file: the manifest, where the number is a result of --mode=evaluate.
    """

    result: str
    measured: Measured
    protocol: str
    real: Measured | None = None
    paper: str = ""
    file: str = ""

    def columns(self) -> dict[str, Any]:
        """For a machine."""
        m, real = self.measured, self.real
        return {
            "result": self.result,
            "value": float(m),
            "standard_error": m.standard_error,
            "unit": m.unit,
            "better": m.better,
            "real": None if real is None else float(real),
            "real_standard_error": None if real is None else real.standard_error,
            "paper": self.paper,
            "out_of_range": m.details.get("outside"),
            "protocol": self.protocol,
            "file": self.file,
        }


def results_there(study: Study) -> dict[str, Manifest]:
    """The results of the run's parameters in its evaluation/, by file: those of the bound first."""
    found, crc = {}, fingerprint(study.run.params)
    for path in files.matching(study.directory.evaluation, "step*.json"):
        try:
            one = manifest.load(path)
        except ValueError as error:
            study.say(f"left out: {error}")
            continue
        if one.subject.get("parameters_crc32") == crc:
            found[path.name] = one

    def place(file: str) -> tuple[Any, ...]:
        network, value = _parsed(found[file])
        split = found[file].measured.protocol.get("split", "")
        order = [*names.BOUND_RESULTS, *VALUES]
        return network, split, order.index(value) if value in order else len(order), file

    return {file: found[file] for file in sorted(found, key=place)}


def _parsed(m: Manifest) -> tuple[str, str]:
    """(features, which value), such as (pixels, fd); ("", which) of the bound."""
    p = m.measured.protocol
    if "features" not in p:
        return "", m.name.removesuffix(f"_{p['split']}")
    features, count = p["features"]["name"], p["samples"]
    known = {names.quality_name(value, features, count): value for value in VALUES}
    return features, known.get(m.name, m.name)


def table(
    study: Study,
    run: Run,
    images: np.ndarray,
    outside: np.ndarray,
    source: Source,
    held_out: Source | None,
) -> list[Row]:
    """The results, then what `real_lines` adds, then the share out of range of the samples.

    Args:
      run: of `sample_sets.drawn_by`. images, outside: its samples, and their shares out of range.
      source: the reference. held_out: real images that are not among it, or None.
    """
    found = results_there(study)
    rows = {file: as_row(m, file) for file, m in found.items()}
    if held_out is not None:
        rows |= real_lines(study, run, images, found, source, held_out)
    percent, n = 100 * outside.astype(np.float64), len(outside)
    error = float(percent.std(ddof=1)) / n**0.5 if n > 1 else None
    share = Measured(float(percent.mean()), error, "% of values", "lower")
    of_these = f"{_of_samples(_manner_of(run), run.config)}; seed {run.config.seed}"
    return [*rows.values(), Row("out_of_range", share, of_these)]


def as_row(m: Manifest, file: str) -> Row:
    """A result's line. The median distance of held-out images stands in `nearest`'s."""
    held_out = m.measured.details.get("held_out_quantile_0.5")
    real = None if held_out is None else Measured(held_out, None, m.measured.unit)
    return Row(m.name, m.measured, in_words(m), real, paper_s(m), file)


def in_words(m: Manifest) -> str:
    """The protocol, and of the estimator what the number's error depends on."""
    p, config = m.measured.protocol, m.subject["config"]
    seed = f"seed {m.measured.estimator['seed']}"
    if "features" in p:
        text = _of_samples(p, config)
        if "reference" in p:
            mirrored = " and their mirror images" if p["reference"].get("mirror") else ""
            text += f"; against {_images(p['reference'])}{mirrored}"
        network = p["features"]["name"]
        return f"{text}; in {'pixels' if network == 'pixels' else network + ' features'}; {seed}"
    steps = config["diffusion"]["num_steps"] if p["chain"] == "all" else p["chain"]
    terms, draws = m.measured.estimator["terms"], m.measured.estimator["draws"]
    text = f"{_images(p)}; chain of {steps:,} steps, "
    text += "all terms" if terms == "all" else f"{terms:,} stratified terms an image"
    text += f" at {draws} draws of the noise" if draws > 1 else ""
    return f"{text}; x̂_0 {'' if p['clip'] else 'not '}clipped; {_parameters(p)}; {seed}"


def _images(p: dict[str, Any]) -> str:
    some = "all" if p["images"] == p["of"] else f"{p['images']:,} of"
    return f"{some} {p['of']:,} images of {p['data']}/{p['split']}"


def _of_samples(p: dict[str, Any], config: Any) -> str:
    num_steps = config["diffusion"]["num_steps"]
    steps = f"all {num_steps:,}" if p["chain"] == "all" else f"{p['chain']:,} of {num_steps:,}"
    eta = f", η = {p['eta']:g}" if p["sampler"] == "ddim" else ""
    clipped = "" if p["clip"] else "not "
    text = f"{p['samples']:,} samples: {p['sampler']}, {steps} steps{eta}, x̂_0 {clipped}clipped"
    return f"{text}; {_parameters(p)}"


def _parameters(p: dict[str, Any]) -> str:
    best = f", {p['checkpoint']}" if p.get("checkpoint", "given") != "given" else ""
    dtype = "" if p.get("dtype", "float32") == "float32" else f", {p['dtype']}"
    return PARAMETERS.get(p["parameters"], p["parameters"]) + best + dtype


def _manner_of(run: Run) -> dict[str, Any]:
    p = generation.sampling_protocol(run)
    chain = "all" if p["steps"] == p["num_steps"] else p["steps"]
    return p | {"samples": p["count"], "chain": chain, "checkpoint": "given"}


def paper_s(m: Manifest) -> str:
    """Table 1's number, where it was measured alike; else ""."""
    p, config = m.measured.protocol, m.subject["config"]
    kind = config["diffusion"]["prediction"], config["train"]["objective"]
    fixed = config["diffusion"]["variance"].startswith("fixed")
    alike = fixed and p["clip"] and p["chain"] == "all" and p["parameters"] == "ema"
    alike &= p["dtype"] == "float32" and has_paper_s_chain(config)
    if "features" in p:
        real = p.get("reference", {"data": config["data"]["name"]})
        whole = real.get("split", "train") == "train" and real.get("images") == real.get("of")
        alike &= p["sampler"] == "ancestral" and whole and not real.get("mirror")
    else:
        real = p
        alike &= p["images"] == p["of"]
    on_cifar10 = real["data"].partition(":")[0] == "cifar10"
    return PAPER.get(kind, {}).get(m.name, "") if alike and on_cifar10 else ""


def real_lines(
    study: Study,
    run: Run,
    images: np.ndarray,
    found: dict[str, Manifest],
    source: Source,
    held_out: Source,
) -> dict[str, Row]:
    """The lines of results of these samples, with those of as many held-out images, by file.

    Where there are fewer held-out images, a line of its own has both at their number, by its name.
    Inception scores, which need more than features, have none, and `nearest` has its own.
    """
    e, lines = run.config.evaluation, {}
    beside = reference.data_protocol(source, e.reference_count) | {"mirror": e.reference_mirror}
    alike = _manner_of(run) | {"reference": beside}
    ours: dict[str, dict[str, str]] = {}
    for file, m in found.items():
        features, value = _parsed(m)
        if features and _measured_on(m, alike):
            ours.setdefault(features, {})[value] = file
    n = min(len(images), len(held_out))
    for features, by_value in ours.items():
        try:
            extractor = make_extractor(features, e.weights, e.cache_dir)
        except RequestError as error:
            study.say(f"no lines of real images in {features}: {error}")
            continue
        space = Space(study, run, extractor)
        for value, pair in _both(space, images, source, held_out, list(by_value), n).items():
            m = found[by_value[value]]
            protocol, kind = m.measured.protocol | {"samples": n}, m.measured
            own, real = (
                Measured(*x, kind.unit, kind.better, protocol, kind.estimator) for x in pair
            )
            if n == len(images):
                lines[by_value[value]] = dataclasses.replace(as_row(m, by_value[value]), real=real)
                continue
            words = in_words(dataclasses.replace(m, measured=own))
            name = names.quality_name(value, features, n)
            lines[name] = Row(name, own, f"the first {words}", real)
    return lines


def _measured_on(m: Manifest, alike: dict[str, Any]) -> bool:
    keys = ("samples", "sampler", "chain", "eta", "clip", "parameters", "dtype", "reference")
    p = m.measured.protocol
    return all(p.get(k) == alike[k] for k in keys) and m.measured.estimator["seed"] == alike["seed"]


def _both(
    space: Space, images: np.ndarray, source: Source, held_out: Source, values: list[str], n: int
) -> dict[str, list[tuple[float, float | None]]]:
    """The values of the first n samples and of n held-out images, each with its error."""
    metrics = []
    for metric, kind in names.KINDS.items():
        try:
            if metric not in ("is", "nearest") and set(kind.values) & set(values):
                quality.check((metric,), space.extractor, n, source.image_shape, len(source))
                metrics.append(metric)
        except ValueError as error:
            space.study.say(f"no line of real images: {error}")
    if not metrics:
        return {}
    real, new = space.real(source), space.real(held_out)
    own = space.samples(images)["features"][:n]
    others = new.features[reference.evenly(len(new.features), n)]

    def piece(start: int, _: int) -> dict[str, np.ndarray]:
        metric = metrics[start]
        sets = (quality.Sets(x, None, real, None, space.run.config.seed) for x in (own, others))
        both = [quality.METRICS[metric][2](s) for s in sets]
        numbers = [[found[v][:2] for found in both] for v in names.KINDS[metric].values]
        return {"numbers": np.array(numbers, np.float64)}  # None becomes NaN.

    protocol = {
        "samples": generation.sampling_protocol(space.run),
        "held_out": new.protocol,
        "reference": real.protocol,
        "metrics": metrics,
        "n": n,
    }
    numbers = space.study.arrays(protocol, len(metrics), 1, piece, "metric")["numbers"]
    every = [value for metric in metrics for value in names.KINDS[metric].values]
    pairs = dict(zip(every, numbers.tolist(), strict=True))
    return {
        value: [(number, None if np.isnan(error) else error) for number, error in pairs[value]]
        for value in values
        if value in pairs
    }


def markdown(title: str, rows: Sequence[Row]) -> str:
    """The table in Markdown, with the protocols numbered below it."""
    heads = columns(rows)
    notes = protocols(rows)
    lines = [title, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(cells(row, heads, notes))} |")
    lines += ["", *(f"{k}. {text}" for k, text in enumerate(notes, 1))]
    return "\n".join(lines) + "\n"


def columns(rows: Sequence[Row]) -> list[str]:
    """The heads of the columns, of those that are not empty."""
    some = {
        "real images": any(row.real is not None for row in rows),
        "paper": any(row.paper for row in rows),
    }
    heads = ("result", "value", "real images", "paper", "protocol")
    return [head for head in heads if some.get(head, True)]


def protocols(rows: Sequence[Row]) -> list[str]:
    """The protocols in words, each once, as they are numbered."""
    return list(dict.fromkeys(row.protocol for row in rows))


def cells(row: Row, heads: Sequence[str], notes: Sequence[str]) -> list[str]:
    """A row's text in these columns."""
    text = {
        "result": row.result,
        "value": row.measured.text(),
        "real images": "" if row.real is None else row.real.text(),
        "paper": row.paper,
        "protocol": str(notes.index(row.protocol) + 1),
    }
    return [text[head] for head in heads]
