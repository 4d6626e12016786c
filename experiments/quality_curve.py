"""A metric of sample quality along x̂_0's way, beside that of real images held out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_jax.config import RequestError
from ddpm_jax.data import Source
from ddpm_jax.evaluation import names, reference, requests
from ddpm_jax.evaluation.features import Extractor, make_extractor
from ddpm_jax.evaluation.manifest import Measured
from ddpm_jax.evaluation.metrics import Estimate
from ddpm_jax.evaluation.quality import MAX_COVARIANCE, METRICS, Sets, check
from ddpm_jax.generation import padded_batch
from ddpm_jax.parts import Arrays, collect
from ddpm_jax.runs import image_shape
from experiments.common import Study
from experiments.continuations import row
from experiments.sample_sets import held_out_split


def default_metric(shape: tuple[int, int, int]) -> str:
    """The Fréchet distance of pixels, or where their covariance is too large the kernel's."""
    return "fd_pixels" if math.prod(shape) <= MAX_COVARIANCE else "kd_pixels"


@dataclasses.dataclass(frozen=True)
class Quality:
    """A metric of sample quality, of x̂_0 and of real images.

    held_out: positions in `source` of as many real images as there are samples, or all of fewer;
    none where the metric needs more or nothing is held out (`source` None).
    """

    metric: str
    extractor: Extractor
    compute: reference.Compute
    batch: int
    real: reference.Reference | None
    source: Source | None
    held_out: np.ndarray

    @classmethod
    def of(cls, study: Study) -> Quality:
        """What --metric names, its reference's features computed unless they are there.

        Raises:
          RequestError: no such metric, data or weights; or too few images for it.
        """
        config, count = study.run.config, study.flags.count
        e, shape = config.evaluation, image_shape(config)
        reals = requests.open_split(config, e.reference, "evaluation.reference")
        used = len(requests.positions(reals, e.reference_count, "evaluation.reference_count"))
        asked = study.flags.metric or default_metric(shape)
        try:
            metric, features = names.parse(asked)
        except ValueError as error:
            raise RequestError(f"--metric{str(error).removeprefix('evaluation.metrics')}") from None
        if metric == names.BOUND:
            raise RequestError(f"--metric={asked} is not of samples; choose fd_pixels, say")
        extractor = make_extractor(features, e.weights, e.cache_dir)
        try:
            check([metric], extractor, count, shape, used)
        except ValueError as error:
            raise RequestError(f"--metric={asked} --count={count}: {error}") from None
        source, held_out = held_out_split(study), np.arange(0)
        if source is None:
            study.say(f"config.evaluation.split holds nothing out from {e.reference}: x̂_0 alone")
        else:
            beside = min(count, len(source))
            try:
                check([metric], extractor, beside, shape, used)
                held_out = reference.evenly(len(source), beside)
            except ValueError as error:
                study.say(f"no line of {source.split} beside the samples: {error}")
        batch = padded_batch(e.batch_size, study.run.layout)
        compute = reference.compile_extractor(extractor, study.run.layout, batch)
        how = e.reference_count, e.reference_mirror, e.cache_dir, e.statistics, batch, study.say
        real = None
        if metric != "is":
            real = reference.load_reference(extractor, compute, reals, *how)
        return cls(metric, extractor, compute, batch, real, source, held_out)

    @property
    def values(self) -> list[str]:
        """The names of what the metric gives, e.g. fd_pixels."""
        return [f"{value}_{self.extractor.name}" for value in names.KINDS[self.metric].values]

    def protocol(self, study: Study) -> dict[str, Any]:
        """All that the curve depends on, beside the samples."""
        n = len(self.held_out)
        return {
            "metric": self.metric,
            "features": {"name": self.extractor.name, **self.extractor.identity},
            "reference": self.real and self.real.protocol,
            "held_out": n and reference.data_protocol(self.source, n),
            "seed": study.run.config.seed,
        }

    def curve(self, study: Study, sets: Sequence[np.ndarray], of_samples: dict[str, Any]) -> Arrays:
        """value and error, each float64 [sets, values]; an unknown error is NaN.

        Args:
          sets: each uint8 [count, h, w, c]: x̂_0 at each point, and the samples. The images held
            out are added at the end, where there are enough.
          of_samples: what the sets depend on, beside the run.
        """
        sets = list(sets)
        if len(self.held_out):
            sets.append(self.source.images(self.held_out))

        def piece(start: int, length: int) -> Arrays:
            estimates = [self._measure(study, sets[start + k]) for k in range(length)]
            errors = [[e.standard_error for e in found] for found in estimates]
            return {
                "value": np.array([[e.value for e in found] for found in estimates]),
                "error": np.array(errors, dtype=np.float64),  # None is NaN.
            }

        protocol = of_samples | {"part": "quality"} | self.protocol(study)
        return study.arrays(protocol, len(sets), 1, piece, "point")

    def _measure(self, study: Study, images: np.ndarray) -> list[Estimate]:
        piece = lambda start, length: self.compute(images[start : start + length])  # noqa: E731
        found = collect(len(images), self.batch, piece, "image", study.say)
        seed = study.run.config.seed
        sets = Sets(found["features"], found.get("logits"), self.real, None, seed)
        return list(METRICS[self.metric][2](sets).values())

    def rows(self, curve: Arrays, times: Sequence[int]) -> list[dict[str, Any]]:
        """Those of the table; `times` are those of x̂_0."""
        of = [("x0_hat", t) for t in times] + [("samples", 0)]
        of += [("held-out images", None)] * (len(self.held_out) > 0)
        return [
            row(name, *of[k], curve["value"][k, j], curve["error"][k, j])
            for j, name in enumerate(self.values)
            for k in range(len(of))
        ]

    def notes(self, study: Study, curve: Arrays) -> list[str]:
        """What the curve ends at, beside the real images, and what to beware of."""
        count, real, notes = study.flags.count, len(self.held_out), []
        last = -2 if real else -1  # The samples; after them, where they are, the images held out.
        for j, name in enumerate(self.values):
            text = [
                Measured(curve["value"][k, j], curve["error"][k, j]).text() for k in range(last, 0)
            ]
            beside = f", {text[1]} for {real:,} images of {self.source.split}" if real else ""
            notes.append(f"{name}: {text[0]} for {count:,} samples{beside}.")
        if self.metric == "fd" and real not in (0, count):
            notes.append(f"Fréchet distances fall with n: {count:,} and {real:,} are not alike.")
        shape = image_shape(study.run.config)
        if self.metric == "fd" and count <= self.extractor.num_features(shape):
            notes.append("With no more images than features a Fréchet distance is mostly bias.")
        return notes
