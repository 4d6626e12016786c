"""The evaluators of a config: built once, called with a run's parameters, yielding (name, number).

Everything a request can get wrong (data, weights, sizes, metrics) is found while they are built.
Training and `--mode=evaluate` use the same ones.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ddpm_jax import figures, files, generation, parts, sampling
from ddpm_jax.config import RequestError
from ddpm_jax.data import Source
from ddpm_jax.evaluation import bound, cost, names, reference, requests
from ddpm_jax.evaluation.drawing import Drawer
from ddpm_jax.evaluation.features import Extractor, make_extractor
from ddpm_jax.evaluation.manifest import Measured, digest
from ddpm_jax.evaluation.neighbors import neighbors_of
from ddpm_jax.evaluation.quality import METRICS, Sets, check
from ddpm_jax.evaluation.requests import Asked, Evaluator, result_key
from ddpm_jax.parallel import first_hosts
from ddpm_jax.parts import collect
from ddpm_jax.runs import Run, RunDirectory, image_shape

Say = Callable[[str], None]
NEIGHBORS_SHOWN = 16


def _check_seen(arrays: object, path: epath.Path) -> None:
    """Refuses to go on where the first host has read a file and this one has not.

    Raises:
      RequestError: this one has not.
    """
    if arrays is None:
        raise RequestError(f"{path} cannot be read on this host: all need the same disk")


def make_evaluators(run: Run, say: Say) -> list[Evaluator]:
    """The evaluators that `run.config.evaluation` asks for, one a split and one a feature network.

    Args:
      run: its config, process, model, layout and kind of parameters are used. Its parameters may
        be abstract: jax.ShapeDtypeStructs with shardings.
    Raises:
      RequestError: data or weights are missing or do not fit.
    """
    e = run.config.evaluation
    asked = list(dict.fromkeys(names.parse(metric) for metric in e.metrics))
    found: list[Evaluator] = []
    if (names.BOUND, "") in asked:
        found += [BoundEvaluator(run, split, say) for split in e.split]
    drawer = Drawer(say)
    for features in dict.fromkeys(f for _, f in asked if f):
        metrics = [metric for metric, f in asked if f == features]
        try:
            extractor = make_extractor(features, e.weights, e.cache_dir)
        except RequestError as error:
            others = [m for m in e.metrics if names.parse(m)[1] != features]
            hint = f"; or leave it out: --config.evaluation.metrics={','.join(others)}"
            raise RequestError(f"{error}{hint if others else ''}") from error
        found.append(QualityEvaluator(run, extractor, metrics, say, drawer))
    return found


class BoundEvaluator:
    """The bound over a split: see `bound`."""

    bulky = False

    def __init__(self, run: Run, split: str, say: Say):
        self._run, self._say, self._split = run, say, split
        e = run.config.evaluation
        self._source = requests.open_split(run.config, split, "evaluation.split")
        self._positions = requests.positions(self._source, e.max_images, "evaluation.max_images")
        wanted = min(e.batch_size, len(self._positions))
        self._batch = generation.padded_batch(wanted, run.layout)
        self._process = sampling.shorten(run.process, e.steps) if e.steps else run.process
        self._terms = bound.checked_terms(e.terms, self._process.schedule.num_steps)
        self._compute = bound.compile_terms(
            run.layout,
            self._process,
            run.apply,
            run.params_sharding,
            run.config.seed,
            self._terms,
            e.clip,
        )
        self._announced = False
        protocol = {
            **reference.data_protocol(self._source, e.max_images),
            **requests.model_protocol(run),
            "chain": requests.chain(e.steps, run.config.diffusion.num_steps),
            "clip": e.clip,
            "decoder": "discretised Gaussian, 256 levels",
        }
        estimator = {"seed": run.config.seed, "terms": self._terms or "all", "draws": e.draws}
        kinds = names.results((names.BOUND,), (split,), 0)
        self.asked = {name: Asked(kind, protocol, estimator) for name, kind in kinds.items()}

    def __call__(
        self,
        step: int,
        params: Any,
        wanted: Iterable[str] | None = None,
        directory: RunDirectory | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[str, Measured]]:
        run = dataclasses.replace(self._run, step=step, params=params)
        wanted = self.asked if wanted is None else wanted
        keep: dict[str, Any] = {"stop": stop}
        if directory is not None:
            (arrays,) = self.files(run, directory).values()
            there = parts.read(arrays) if arrays.exists() else None
            if first_hosts(np.array(there is not None)):
                _check_seen(there, arrays)
                yield from self._results(bound.Bound(**there), wanted, arrays)
                return
            keep |= {"directory": arrays.with_suffix(".parts"), "protocol": {"key": arrays.stem}}
        self._announce(run)
        measured = bound.measure(
            self._compute,
            run.params,
            self._source.images,
            self._positions,
            self._batch,
            self._process.schedule.num_steps,
            self._terms,
            run.config.evaluation.draws,
            self._say,
            **keep,
        )
        if directory is not None and jax.process_index() == 0:
            files.replace_with(arrays, measured.save)
            keep["directory"].rmtree()
        yield from self._results(measured, wanted, arrays if directory is not None else None)

    def files(self, run: Run, directory: RunDirectory) -> dict[str, epath.Path]:
        """The bound's arrays, of all its results."""
        name = f"{names.BOUND}_{self._split}"
        stem = f"step{run.step}_bound_{self._split}_{result_key(run, self.asked[name])}"
        return {name: directory.evaluation / f"{stem}.npz"}

    def _announce(self, run: Run) -> None:
        if self._announced:
            return
        self._announced = True
        n, terms = len(self._positions), self._terms or self._process.schedule.num_steps
        cost.announce(
            f"bits/dim of {self._split}: {n:,} images × {terms:,} terms",
            run.layout,
            run.apply,
            run.params,
            (self._batch, *image_shape(run.config)),
            -(-n // self._batch) * run.config.evaluation.draws * terms,
            self._say,
        )

    def _results(
        self, measured: bound.Bound, wanted: Iterable[str], arrays: epath.Path | None
    ) -> Iterator[tuple[str, Measured]]:
        details: dict[str, Any] = {"noise_standard_error": measured.noise_error()}
        if arrays is not None:
            details["arrays"] = arrays.name
        for value, (number, error) in measured.summary().items():
            name = f"{value}_{self._split}"
            if name in wanted:
                more = details if value == names.BOUND else {}
                yield name, self.asked[name].measured(number, error, more)


class QualityEvaluator:
    """Metrics of samples against real images in the features of one network."""

    bulky = True

    def __init__(
        self,
        run: Run,
        extractor: Extractor,
        metrics: Sequence[str],
        say: Say,
        drawer: Drawer | None = None,
    ):
        """See `make_evaluators`.

        Args:
          extractor: of `features.make_extractor`, or your own from `features.from_function`.
          metrics: keys of `quality.METRICS`.
          drawer: of the samples, shared by evaluators of the same run.
        """
        # What is measured is the count of evaluation, drawn as `sample` says.
        config = copy.deepcopy(run.config)
        config.sample.count = config.evaluation.count
        self._run = dataclasses.replace(run, config=config)
        e = config.evaluation
        self._say, self._metrics = say, metrics
        self._extractor, features = extractor, extractor.name
        self._source = requests.open_split(config, e.reference, "evaluation.reference")
        requests.positions(self._source, e.reference_count, "evaluation.reference_count")
        others = [split for split in e.split if split != e.reference]
        self._held_out = None
        if others and "nearest" in metrics:
            self._held_out = requests.open_split(config, others[0], "evaluation.split")
        try:
            real = e.reference_count or len(self._source)
            check(metrics, extractor, e.count, image_shape(config), real)
        except ValueError as error:
            raise RequestError(f"config.evaluation: {error}") from error
        self._batch = generation.padded_batch(e.batch_size, run.layout)
        self._compute = reference.compile_extractor(extractor, run.layout, self._batch)
        self._draw = drawer or Drawer(say)
        self._references: dict[str, reference.Reference] = {}
        if e.statistics:  # A file that does not fit is found now.
            self._reference(self._source, None)
        how, num_steps = config.sample, config.diffusion.num_steps
        real = reference.data_protocol(self._source, e.reference_count)
        protocol = {
            "samples": e.count,
            "features": {"name": features, **self._extractor.identity},
            **requests.model_protocol(run),
            "sampler": how.method,
            "chain": requests.chain(how.steps, num_steps),
            "eta": how.eta,
            "clip": how.clip,
            "rounding": "nearest of 256 levels",
        }
        estimator = {"seed": config.seed}
        self.asked = {}
        for metric in metrics:
            beside = {} if metric == "is" else {"reference": real | {"mirror": e.reference_mirror}}
            if metric == "nearest" and self._held_out is not None:
                beside["held_out"] = reference.data_protocol(self._held_out, 0)
            asked = Asked(names.KINDS[metric], protocol | beside, estimator)
            self.asked |= {
                names.quality_name(value, features, e.count): asked for value in asked.kind.values
            }

    def __call__(
        self,
        step: int,
        params: Any,
        wanted: Iterable[str] | None = None,
        directory: RunDirectory | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[str, Measured]]:
        run = dataclasses.replace(self._run, step=step, params=params)
        wanted = self.asked if wanted is None else wanted
        name = self._extractor.name
        real = self._reference(self._source, stop) if set(self._metrics) - {"is"} else None
        held_out = self._reference(self._held_out, stop) if self._held_out is not None else None
        images, outside = self._draw(run, directory, stop)
        found = self._features(run, images, directory, stop)
        sets = Sets(
            found["features"],
            found.get("logits"),
            real,
            held_out.features if held_out else None,
            run.config.seed,
        )
        count = len(images)
        details = {"outside": float(outside.mean())}
        for metric in self._metrics:
            values = names.KINDS[metric].values
            if not any(names.quality_name(v, name, count) in wanted for v in values):
                continue
            if metric == "nearest" and directory is not None and jax.process_index() == 0:
                (picture,) = self.files(run, directory).values()
                self._show(picture, images, sets)
                self._say(f"samples over their nearest of {self._source.split}: {picture}")
            for value, estimate in METRICS[metric][2](sets).items():
                result = names.quality_name(value, name, count)
                more = details | estimate.details
                yield result, self.asked[result].measured(*estimate[:2], more)

    def files(self, run: Run, directory: RunDirectory) -> dict[str, epath.Path]:
        """The picture of nearest neighbours."""
        name = names.quality_name("nearest", self._extractor.name, run.config.evaluation.count)
        if name not in self.asked:
            return {}
        key = result_key(run, self.asked[name])
        return {name: directory.evaluation / f"step{run.step}_{name}_{key}.png"}

    def _reference(self, source: Source, stop: Callable[[], bool] | None) -> reference.Reference:
        """Computed once for all calls."""
        e = self._run.config.evaluation
        if source.split not in self._references:
            is_reference = source is self._source
            self._references[source.split] = reference.load_reference(
                self._extractor,
                self._compute,
                source,
                e.reference_count if is_reference else 0,
                e.reference_mirror and is_reference,
                e.cache_dir,
                e.statistics if is_reference else "",
                self._batch,
                self._say,
                stop,
            )
        return self._references[source.split]

    def _features(
        self,
        run: Run,
        images: np.ndarray,
        directory: RunDirectory | None,
        stop: Callable[[], bool] | None,
    ) -> dict[str, np.ndarray]:
        def piece(start: int, length: int) -> dict[str, np.ndarray]:
            return self._compute(images[start : start + length])

        if directory is None:
            return collect(len(images), self._batch, piece, "image", self._say, stop=stop)
        key = digest(generation.sampling_protocol(run), self._extractor.identity)
        path = directory.evaluation / f"step{run.step}_{self._extractor.name}_{key}.npz"
        there = parts.read(path) if path.exists() else None
        if first_hosts(np.array(there is not None)):
            _check_seen(there, path)
            return there
        keep = {"directory": path.with_suffix(".parts"), "protocol": {"key": key}}
        found = collect(len(images), self._batch, piece, "image", self._say, stop=stop, **keep)
        if jax.process_index() == 0:
            files.replace_with(path, lambda file: np.savez(file, **found))
            keep["directory"].rmtree()
        return found

    def _show(
        self,
        path: Any,
        images: np.ndarray,
        sets: Sets,
    ) -> None:
        shown = slice(0, NEIGHBORS_SHOWN)
        nearest = neighbors_of(sets.features[shown], sets.real.features).positions[:, 0]
        e = self._run.config.evaluation
        positions = reference.evenly(len(self._source), e.reference_count)
        neighbors = self._source.images(positions[nearest % len(positions)])
        mirrored = (nearest >= len(positions))[:, None, None, None]
        neighbors = np.where(mirrored, neighbors[:, :, ::-1], neighbors)
        pair = np.concatenate([images[shown], neighbors])
        figures.save_png(path, figures.grid(pair, columns=len(neighbors)))
