"""The config: every field with its default, type and meaning; variants, overrides, validation.

A config is one locked `ConfigDict`. A file in configs/ starts from `default_config()`, changes what
differs and passes the text after the colon of `--config=file.py:text` to `apply_variants`.
Everything that can be wrong with a request is found by `validate`, before anything is compiled,
and raised as `RequestError`: one line that names the key, the value and the choices.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from ddpm_jax import bounded, losses, schedules
from ddpm_jax.diffusion import PREDICTIONS, VARIANCES, Process
from ddpm_jax.evaluation import names
from ddpm_jax.sampling import METHODS


class RequestError(ValueError):
    """The request cannot be carried out as it stands; the message says why in one line."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A leaf of the config: its default (whose type is the leaf's), meaning and allowed values."""

    default: Any
    meaning: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None


FIELDS: dict[str, Field] = {
    "seed": Field(0, "seed of everything random", low=0, high=2**31 - 1),
    # Data.
    "data.name": Field(
        "cifar10", "digits, folder, lsun_lmdb/CATEGORY, or the name of a TFDS image set"
    ),
    "data.split": Field("train", "the split to train on"),
    "data.data_dir": Field("", "TFDS data_dir, the folder of images, or of LSUN's LMDBs"),
    "data.cache_dir": Field(
        "~/.cache/ddpm_jax/data", "where decoded images and lists of keys are kept"
    ),
    "data.image_size": Field(32, "height and width in pixels", low=1),
    "data.channels": Field(3, "1 for grey, 3 for RGB", low=1),
    "data.flip": Field(True, "mirror each training image left to right with probability 1/2"),
    "data.resident_bytes": Field(2**30, "sets up to this size live on the device", low=0),
    "data.cache_bytes": Field(
        0, "sets up to this size are decoded once, into cache_dir; folders always are", low=0
    ),
    "data.read_attempts": Field(3, "attempts to read an image before the run stops", low=1),
    "data.stall_seconds": Field(300.0, "how long a batch may take to be read; 0: for ever", low=0),
    # Network.
    "model.channels": Field(128, "width at the first resolution", low=1),
    "model.channel_multipliers": Field((1, 2, 2, 2), "width of each resolution / channels", low=1),
    "model.num_res_blocks": Field(2, "residual blocks a resolution", low=1),
    "model.attention_resolutions": Field((16,), "attention at maps of these heights", low=1),
    "model.norm_groups": Field(32, "groups of the group normalisation, at most", low=1),
    "model.dropout": Field(0.1, "dropout rate in the residual blocks", low=0, high=0.99),
    "model.dtype": Field("float32", "dtype of computation", choices=("float32", "bfloat16")),
    # Diffusion.
    "diffusion.schedule": Field("linear", "schedule of β_t", choices=tuple(schedules.SCHEDULES)),
    "diffusion.num_steps": Field(1000, "T", low=1),
    "diffusion.beta_start": Field(1e-4, "β_1 (linear, quadratic, warmup)", low=0, high=1),
    "diffusion.beta_end": Field(0.02, "β_T (linear, quadratic, warmup, constant)", low=0, high=1),
    "diffusion.prediction": Field("eps", "what the network predicts", choices=tuple(PREDICTIONS)),
    "diffusion.variance": Field("fixed_large", "Σ_θ of the reverse process", choices=VARIANCES),
    # Training.
    "train.objective": Field("simple", "what is minimised", choices=losses.OBJECTIVES),
    "train.timesteps": Field(
        "independent", "how a batch's t are drawn", choices=tuple(losses.TIMESTEPS)
    ),
    "train.steps": Field(800_000, "optimizer steps in all", low=0),
    "train.batch_size": Field(128, "images a step, over all devices", low=1),
    "train.learning_rate": Field(2e-4, "Adam's step size after the warm-up", low=0),
    "train.warmup_steps": Field(5000, "steps over which the learning rate rises from 0", low=0),
    "train.clip_norm": Field(1.0, "clip of the global gradient norm; 0: none", low=0),
    "train.ema_decay": Field(0.9999, "decay of the parameters' moving average", low=0, high=1),
    "train.ema_ramp": Field(False, "let the decay rise as step/(step+10), for short runs"),
    "train.steps_per_call": Field(1, "optimizer steps in one compiled call", low=1),
    "train.log_every": Field(100, "steps between lines of metrics", low=1),
    "train.checkpoint_every": Field(5000, "steps between checkpoints", low=1),
    "train.sample_every": Field(5000, "steps between sample grids; 0: only at the end", low=0),
    "train.evaluate_every": Field(0, "steps between evaluations; 0: none", low=0),
    "train.keep_checkpoints": Field(3, "newest checkpoints to keep", low=1),
    "train.keep_every": Field(0, "checkpoints at multiples of this are kept too; 0: none", low=0),
    "train.keep_best": Field("", "result whose best checkpoint is kept, e.g. bits_per_dim_test"),
    "train.nonfinite": Field(
        "stop", "what a loss or gradient that is not finite does", choices=("stop", "skip")
    ),
    "train.max_skipped": Field(10, "updates that nonfinite=skip leaves out in all, at most", low=1),
    "train.write_errors": Field(
        "stop", "what a file that cannot be written does", choices=("stop", "continue")
    ),
    "train.max_restarts": Field(3, "starts in a row without progress; 0: any number", low=0),
    # Sampling.
    "sample.method": Field("ancestral", "the sampler", choices=METHODS),
    "sample.steps": Field(0, "reverse steps; 0: all T", low=0),
    "sample.eta": Field(0.0, "DDIM's η: 0 deterministic, 1 as noisy as β̃_t", low=0, high=1),
    "sample.clip": Field(True, "clip x̂_0 to [−1, 1] at each step"),
    "sample.count": Field(64, "images in all", low=1),
    "sample.batch_size": Field(64, "images at a time, over all devices", low=1),
    # Evaluation.
    "evaluation.metrics": Field(
        (names.BOUND, "fid", "is"), "bits_per_dim, fid, is, kid, fd_pixels, kd_effnetlite0_64, …"
    ),
    "evaluation.split": Field(("test",), "splits of bits/dim; the first is held out for `nearest`"),
    "evaluation.max_images": Field(0, "images of a split, evenly spread; 0: all of them", low=0),
    "evaluation.steps": Field(0, "length of the chain whose bound is measured; 0: all T", low=0),
    "evaluation.terms": Field(
        0, "of an image's T terms this many, stratified and unbiased; 0: all", low=0
    ),
    "evaluation.draws": Field(1, "draws of the noise for each image's bound", low=1),
    "evaluation.clip": Field(True, "clip x̂_0 to [−1, 1] in the bound"),
    "evaluation.count": Field(50_000, "samples whose quality is measured", low=2),
    "evaluation.reference": Field("train", "the split that samples are compared with"),
    "evaluation.reference_count": Field(0, "images of it, evenly spread; 0: all of them", low=0),
    "evaluation.reference_mirror": Field(False, "add their mirror images"),
    "evaluation.statistics": Field("", "file of the reference's features, instead of the cache's"),
    "evaluation.weights": Field("", "file or folder of the Inception network's weights"),
    "evaluation.cache_dir": Field("~/.cache/ddpm_jax/evaluation", "where features are kept"),
    "evaluation.checkpoint": Field("newest", "newest, best (see train.keep_best), or a step"),
    "evaluation.ema": Field(True, "the parameters' moving average, or the parameters themselves"),
    "evaluation.batch_size": Field(128, "images at a time, over all devices", low=1),
    # Devices.
    "parallel.mode": Field("jit", "how a step is spread", choices=("jit", "fsdp", "pmap")),
    "parallel.microbatches": Field(
        0, "parts of a device's batch, one after another; 0: one, or as many as suit a CPU", low=0
    ),
    "parallel.remat": Field(False, "compute each block again going back: less memory, more time"),
    "parallel.winograd": Field(True, "on CPUs, convolutions faster, with twice the rounding"),
    "parallel.hang_seconds": Field(
        1800.0, "a run that stands still this long ends itself; 0: never", low=0
    ),
}

# Words after the colon of --config that name a choice, wherever they are unambiguous.
VARIANT_KEYS = ("diffusion.prediction", "diffusion.variance", "train.objective")


def default_config() -> ml_collections.ConfigDict:
    """The default config, its keys locked: the paper's CIFAR-10 run with ε, L_simple and β_t."""
    tree: dict[str, Any] = {}
    for key, field in FIELDS.items():
        group, _, leaf = key.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[leaf] = field.default
    return ml_collections.ConfigDict(tree).lock()


def get(config: ml_collections.ConfigDict, key: str) -> Any:
    """The leaf at a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def override(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
    """Sets the leaf at a dotted key from a value of its type or from text, in place.

    Raises:
      RequestError: an unknown key (the nearest is named), or a value of another type.
    """
    if key not in FIELDS:
        near = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.0)
        raise RequestError(f"--config.{key}: no such key; did you mean {near[0]}?")
    group, _, leaf = key.rpartition(".")
    node = get(config, group) if group else config
    node[leaf] = _converted(key, value, FIELDS[key].default)


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """(dotted key, text) of each `--config.key=value` or `--config.key value`.

    Raises:
      RequestError: anything else, or a missing value.
    """
    overrides, rest = [], list(arguments)
    while rest:
        flag = rest.pop(0)
        key, equals, value = flag.removeprefix("--config.").partition("=")
        if not flag.startswith("--config."):
            raise RequestError(f"unknown argument {flag}; see --help")
        if not equals:
            if not rest:
                raise RequestError(f"{flag} needs a value")
            value = rest.pop(0)
        overrides.append((key, value))
    return overrides


def _converted(key: str, value: Any, default: Any) -> Any:
    kind = type(default)
    try:
        if kind is tuple:
            if isinstance(value, str) and type(default[0]) is str:
                items = tuple(filter(None, (word.strip(" ()'\"") for word in value.split(","))))
            else:
                items = ast.literal_eval(f"({value},)") if isinstance(value, str) else tuple(value)
            if len(items) == 1 and isinstance(items[0], (tuple, list)):
                items = tuple(items[0])
            if not all(type(item) is type(default[0]) for item in items):
                raise ValueError
            return items
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        if kind is int and isinstance(value, (bool, float)):
            raise ValueError
        return kind(value)
    except (ValueError, TypeError, KeyError, SyntaxError):
        expected = {bool: "true or false", int: "an integer"}
        wanted = expected.get(kind, "a number")
        if kind is tuple:
            wanted = "words" if type(default[0]) is str else "integers such as 1,2,2"
        raise RequestError(f"--config.{key}={value}: expected {wanted}, e.g. {default}") from None


def apply_variants(
    config: ml_collections.ConfigDict, text: str, named: dict[str, dict[str, Any]] | None = None
) -> ml_collections.ConfigDict:
    """Applies comma-separated variants, in order, and returns the config.

    A variant is a prediction, variance or objective by its name, or a key of `named`: a bundle of
    overrides that the config file offers.

    Raises:
      RequestError: an unknown variant; the known ones are listed. Two that set the same key.
    """
    known = dict(named or {})
    for key in VARIANT_KEYS:
        known |= {choice: {key: choice} for choice in FIELDS[key].choices}
    set_by: dict[str, str] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word not in known:
            raise RequestError(f"--config: unknown variant {word!r}; known: {', '.join(known)}")
        for key, value in known[word].items():
            if set_by.setdefault(key, word) != word:
                raise RequestError(f"--config: variants {set_by[key]} and {word} both set {key}")
            override(config, key, value)
    return config


def load_file(argument: str) -> ml_collections.ConfigDict:
    """The config of `path.py` or `path.py:variants`.

    Raises:
      RequestError: no such file, a file without get_config, or an unknown variant.
    """
    path, _, variants = argument.partition(":")
    file = pathlib.Path(path)
    if not file.is_file() or file.suffix != ".py":
        near = sorted(p.name for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        listing = f"; there are {', '.join(near)}" if near else ""
        raise RequestError(f"--config={argument}: no file {path}{listing}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(variants)
    except RequestError:
        raise
    except Exception as error:  # Whatever the user's file does.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RequestError(f"--config={argument}: {path} fails: {reason}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise RequestError(f"--config={argument}: get_config of {path} returns no ConfigDict")
    return config


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as JSON text, as it is saved in a run's directory."""
    return json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """The config saved by `to_json`; fields added since then take their defaults."""
    config = default_config()

    def visit(prefix: str, node: dict[str, Any]) -> None:
        for name, value in node.items():
            if isinstance(value, dict):
                visit(f"{prefix}{name}.", value)
            else:
                override(config, prefix + name, value)

    visit("", bounded.parse_json(text))
    return config


def make_schedule(config: ml_collections.ConfigDict) -> schedules.Schedule:
    """The forward process that `config.diffusion` describes."""
    d = config.diffusion
    arguments = {"num_steps": d.num_steps, "beta_start": d.beta_start, "beta_end": d.beta_end}
    if d.schedule == "constant":
        arguments = {"num_steps": d.num_steps, "beta": d.beta_end}
    elif d.schedule in ("jsd", "cosine"):
        arguments = {"num_steps": d.num_steps}
    return schedules.SCHEDULES[d.schedule](**arguments)


def make_process(config: ml_collections.ConfigDict) -> Process:
    """The diffusion process that `config.diffusion` describes."""
    d = config.diffusion
    return Process(make_schedule(config), d.prediction, d.variance)


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks every value and combination that can be checked without data or devices.

    Raises:
      RequestError: names the key, the value, and what is allowed.
    """
    for key, field in FIELDS.items():
        _check_value(key, get(config, key), field)
    _check_network(config)
    _check_cadences(config)
    _check_sampling(config)
    try:
        names.check(config)
    except ValueError as error:
        raise RequestError(f"config.{error}") from None
    try:
        losses.check_combination(config.diffusion.variance, config.train.objective)
        make_schedule(config)
    except ValueError as error:
        raise RequestError(f"config.diffusion: {error}") from None


def _check_value(key: str, value: Any, field: Field) -> None:
    if field.choices and value not in field.choices:
        near = difflib.get_close_matches(value, field.choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RequestError(f"config.{key}={value}: choose from {', '.join(field.choices)}{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"config.{key}={value}: must be finite ({field.meaning})")
    for item in value if isinstance(value, tuple) else (value,):
        too_low = field.low is not None and not item >= field.low
        too_high = field.high is not None and not item <= field.high
        if too_low or too_high:
            bounds = (
                f"at least {field.low}"
                if field.high is None
                else (f"between {field.low} and {field.high}")
            )
            raise RequestError(f"config.{key}={value}: must be {bounds} ({field.meaning})")


def _check_network(config: ml_collections.ConfigDict) -> None:
    size, multipliers = config.data.image_size, config.model.channel_multipliers
    if not multipliers:
        raise RequestError("config.model.channel_multipliers is empty: name at least one, e.g. 1,2")
    factor = 2 ** (len(multipliers) - 1)
    if size % factor:
        raise RequestError(
            f"config.data.image_size={size} does not divide by {factor}, as the "
            f"{len(multipliers)} resolutions of config.model.channel_multipliers need"
        )
    heights = [size // 2**level for level in range(len(multipliers))]
    missing = [r for r in config.model.attention_resolutions if r not in heights]
    if missing:
        raise RequestError(
            f"config.model.attention_resolutions={missing[0]}: the network's maps have the heights "
            f"{', '.join(map(str, heights))}"
        )
    if config.model.channels % 2:
        raise RequestError(
            f"config.model.channels={config.model.channels}: must be even, for sin and cos of t"
        )


def _check_cadences(config: ml_collections.ConfigDict) -> None:
    per_call = config.train.steps_per_call
    for name in ("steps", "log_every", "checkpoint_every", "sample_every", "evaluate_every"):
        value = config.train[name]
        if value % per_call:
            raise RequestError(
                f"config.train.{name}={value} does not divide by train.steps_per_call={per_call}"
            )
    batch, parts = config.train.batch_size, config.parallel.microbatches
    if parts and batch % parts:
        raise RequestError(
            f"config.train.batch_size={batch} does not divide by parallel.microbatches={parts}"
        )


def _check_sampling(config: ml_collections.ConfigDict) -> None:
    sample, num_steps = config.sample, config.diffusion.num_steps
    if sample.steps > num_steps:
        raise RequestError(
            f"config.sample.steps={sample.steps} is more than diffusion.num_steps={num_steps}"
        )
    if sample.method == "ancestral" and sample.eta:
        raise RequestError(
            f"config.sample.eta={sample.eta} has a meaning for sample.method=ddim only"
        )
    strided = 0 < sample.steps < num_steps
    if strided and sample.method == "ancestral" and config.diffusion.variance == "learned":
        raise RequestError(
            "config.sample.steps: diffusion.variance=learned is the variance of single steps, "
            "wrong for longer ones; choose learned_range, sample.method=ddim, or all the steps"
        )
