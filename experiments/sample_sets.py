"""The samples that figures look at, and them and real images in the features of a network.

Samples, features and references that --mode=evaluate has left on the disk are not computed again.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from typing import Any

import numpy as np
from etils import epath

from ddpm_jax import files, generation, parts
from ddpm_jax.config import RequestError
from ddpm_jax.data import Source
from ddpm_jax.evaluation import manifest, reference, requests
from ddpm_jax.evaluation.features import Extractor, make_extractor
from ddpm_jax.runs import Run
from experiments.common import Study

COUNT, STEPS = 1000, 100  # Of samples that are drawn for want of others.
COUNT_ALL_STEPS = 128  # Where the chain cannot be shortened.
NETWORK = "effnetlite0_64"


def drawn_by(
    study: Study,
    count: int = 0,
    default: int = COUNT,
    shorten: bool = True,
    exactly: bool = False,
) -> Run:
    """The run with `config.sample` and seed as they drew, or will draw, the samples to look at.

    Those on the disk from the same parameters are taken: a set of just so many or else the largest,
    of equals the newest; only sets drawn as asked, where `asked` says that it matters.

    Args:
      count: the least number of them; 0 for any.
      default: how many will be drawn where `count` is 0, fewer of a chain that cannot be shortened.
      shorten: whether what is drawn may have a shorter chain, if the request names no other.
      exactly: whether only sets of `count` are taken.
    """
    there = []
    for path in files.matching(study.directory.samples, "step*.npz"):
        run = _drew(study.run, path)
        if run is None or run.config.sample.count < max(count, 2):
            continue
        if exactly and run.config.sample.count != count:
            continue
        if not asked(study) or manner(run) == manner(study.run):
            found = run.config.sample.count
            there.append((found == count, found, files.mtime(path), path.name, run))
    if there:
        *_, name, run = max(there, key=lambda found: found[:4])
        study.say(f"samples: {name}")
        return run
    config = copy.deepcopy(study.run.config)
    how, num_steps = config.sample, config.diffusion.num_steps
    rigid = how.method == "ancestral" and config.diffusion.variance == "learned"
    if shorten and how.steps == 0 and num_steps > STEPS and not rigid:
        how.steps = STEPS
    how.count = count or min(default, COUNT_ALL_STEPS if rigid else default)
    study.say(
        f"no samples drawn so from these parameters yet: drawing {how.count:,} with "
        f"{how.steps or num_steps:,} of {num_steps:,} steps; --config.sample.steps=N for others"
    )
    return dataclasses.replace(study.run, config=config)


def asked(study: Study) -> bool:
    """Whether the request would draw samples in another way than the run's own config."""
    own = dataclasses.replace(study.run, config=study.directory.load_config())
    return manner(study.run) != manner(own)


def manner(run: Run) -> dict[str, Any]:
    """How a run's samples are drawn, however many."""
    protocol = generation.sampling_protocol(run)
    return {key: value for key, value in protocol.items() if key != "count"}


def _drew(run: Run, path: epath.Path) -> Run | None:
    """The run with the config that drew the samples of a file; None: not these parameters."""
    kept = parts.read(path, ("protocol",))
    protocol = json.loads(str(kept["protocol"])) if kept else {}
    if protocol.keys() != generation.sampling_protocol(run).keys():
        return None
    config = copy.deepcopy(run.config)
    keys = {"method": "sampler", "steps": "steps", "eta": "eta", "clip": "clip", "count": "count"}
    config.sample.update({ours: protocol[theirs] for ours, theirs in keys.items()})
    if config.sample.steps == config.diffusion.num_steps:
        config.sample.steps = 0
    config.seed = protocol["seed"]
    found = dataclasses.replace(run, config=config)
    return found if generation.sampling_protocol(found) == protocol else None


@dataclasses.dataclass(frozen=True)
class Space:
    """Images of a run in the features of one network, computed once and kept on the disk.

    run: of `drawn_by`.
    """

    study: Study
    run: Run
    extractor: Extractor

    @functools.cached_property
    def _compute(self) -> reference.Compute:
        return reference.compile_extractor(self.extractor, self.run.layout, self._batch)

    @property
    def _batch(self) -> int:
        return generation.padded_batch(self.run.config.evaluation.batch_size, self.run.layout)

    def real(self, source: Source) -> reference.Reference:
        """Real images' features, as the evaluation has them: of the reference, or all of another.

        Raises:
          RequestError: `config.evaluation.statistics` holds others.
          Interrupted: by SIGINT or SIGTERM; the same command goes on.
        """
        e = self.run.config.evaluation
        is_reference = source.split == e.reference
        return reference.load_reference(
            self.extractor,
            self._compute,
            source,
            e.reference_count if is_reference else 0,
            e.reference_mirror and is_reference,
            e.cache_dir,
            e.statistics if is_reference else "",
            self._batch,
            self.study.say,
        )

    def samples(self, images: np.ndarray) -> parts.Arrays:
        """Those of the samples: "features" [n, d], and "logits" where the network has them."""
        protocol = generation.sampling_protocol(self.run), self.extractor.identity
        name = f"step{self.run.step}_{self.extractor.name}_{manifest.digest(*protocol)}.npz"
        path = self.study.directory.evaluation / name  # The evaluator's.
        there = parts.read(path) if path.exists() else None
        if there is not None:
            return there
        piece = lambda start, length: self._compute(images[start : start + length])  # noqa: E731
        named = {"samples": protocol[0], "features": protocol[1] | {"name": self.extractor.name}}
        return self.study.arrays(named, len(images), self._batch, piece)


def held_out_split(study: Study) -> Source | None:
    """The first of `config.evaluation.split` that is not the reference; None where all are."""
    e = study.run.config.evaluation
    others = [split for split in e.split if split != e.reference]
    return requests.open_split(study.run.config, others[0], "evaluation.split") if others else None


def extractors(study: Study, asked: str) -> list[Extractor]:
    """Those of the features asked for, or of pixels and the network that there is, if any.

    Raises:
      RequestError: unknown features, or no weights for those asked for.
    """
    e = study.run.config.evaluation
    network = "inception" if e.weights else NETWORK
    chosen = asked.split(",") if asked else ["pixels", network]
    found = []
    for name in dict.fromkeys(filter(None, (word.strip() for word in chosen))):
        try:
            found.append(make_extractor(name, e.weights, e.cache_dir))
        except RequestError as error:
            if asked or e.weights:
                raise RequestError(f"--features={name}: {error}") from error
            study.say(f"no network's features, pixels alone: {error}")
    if not found:
        raise RequestError("--features is empty: name at least one, e.g. pixels")
    return found


def real_images(source: Source, e: Any, rows: np.ndarray) -> np.ndarray:
    """uint8 [..., h, w, c]: the images behind rows (int, any shape) of the reference's features.

    Args:
      e: `config.evaluation`, whose reference_count chose the images; mirrored ones follow them.
    """
    positions = reference.evenly(len(source), e.reference_count)
    flat = rows.ravel()
    images = source.images(positions[flat % len(positions)])
    mirrored = (flat >= len(positions))[:, None, None, None]
    return np.where(mirrored, images[:, :, ::-1], images).reshape(*rows.shape, *images.shape[1:])
