"""A run is a directory: its files, and what can be had from it.

config.json     the resolved config
provenance.json versions, devices, commit and command of each start of its training
checkpoints/    one directory a checkpoint, named after the updates done
metrics.jsonl   a JSON object a line
goodput.json    where the time went, over all starts
lock            who trains it
events.…        the same for TensorBoard
best/RESULT/    the checkpoint with the best of a result that train.keep_best names
samples/        picture grids, and the samples of --mode=sample and --mode=evaluate
evaluation/     results with their protocols, one JSON file each, and the arrays behind them
figures/        plots
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from etils import epath

from ddpm_jax import config as config_lib
from ddpm_jax import files, session
from ddpm_jax.diffusion import Process
from ddpm_jax.evaluation import manifest
from ddpm_jax.models import UNet
from ddpm_jax.parallel import Layout, make_layout, to_host
from ddpm_jax.training.checkpoints import Checkpoints
from ddpm_jax.training.state import init_state, make_optimizer

SHARED_SECONDS = 20.0  # In which a file of one host appears on the others.

# What may differ when a run goes on, keys or whole groups: nothing that a step's numbers depend on.
HARMLESS = (
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.sample_every",
    "train.evaluate_every",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.keep_every",
    "train.nonfinite",
    "train.max_skipped",
    "train.write_errors",
    "train.max_restarts",
    "data.data_dir",
    "data.cache_dir",
    "data.resident_bytes",
    "data.cache_bytes",
    "data.read_attempts",
    "data.stall_seconds",
    "sample",
    "evaluation",
    "parallel",
)
# What may differ when a trained model is used: nothing that says what it is a model of.
FOR_USE = (
    *HARMLESS,
    *(
        k
        for k in config_lib.FIELDS
        if k.startswith("data.") and not k.endswith(("size", "channels"))
    ),
    "seed",
    "train",
    "model.dtype",
    "model.dropout",
)


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The paths of a run, local or gs://."""

    path: epath.Path

    @classmethod
    def of(cls, path: epath.PathLike) -> RunDirectory:
        """The run directory at a path, which need not exist.

        Raises:
          RequestError: a gs:// path without the package that reads it, or of a bucket that does not
            answer within 20 seconds; the path of a file; or one that is no text.
        """
        directory = cls(epath.Path(path).expanduser())
        try:
            str(directory.path).encode()
        except UnicodeEncodeError:  # Checkpoints need one.
            raise config_lib.RequestError(
                f"{path!r} is not UTF-8 text; choose another name, or set PYTHONUTF8=1 if it is"
            ) from None
        try:
            is_file = files.answer(
                path, lambda: directory.path.exists() and not directory.path.is_dir()
            )
        except ImportError:
            raise config_lib.RequestError(
                f"{path}: gs:// paths need gcsfs: pip install 'ddpm_jax[gcs]'"
            ) from None
        except OSError as error:
            raise config_lib.RequestError(
                f"{path} cannot be reached: {error.strerror or error}"
            ) from error
        if is_file:
            raise config_lib.RequestError(f"{path} is a file, not a directory")
        return directory

    @property
    def config(self) -> epath.Path:
        """config.json."""
        return self.path / "config.json"

    @property
    def provenance(self) -> epath.Path:
        """provenance.json."""
        return self.path / "provenance.json"

    @property
    def checkpoints(self) -> epath.Path:
        """The directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def best(self) -> epath.Path:
        """The directory of the best checkpoints, one in the folder of each result."""
        return self.path / "best"

    @property
    def metrics(self) -> epath.Path:
        """metrics.jsonl."""
        return self.path / "metrics.jsonl"

    @property
    def goodput(self) -> epath.Path:
        """goodput.json."""
        return self.path / "goodput.json"

    @property
    def samples(self) -> epath.Path:
        """The directory of sampled images."""
        return self.path / "samples"

    @property
    def evaluation(self) -> epath.Path:
        """The directory of results."""
        return self.path / "evaluation"

    @property
    def figures(self) -> epath.Path:
        """The directory of plots."""
        return self.path / "figures"

    def check_shared(self) -> None:
        """Checks that all hosts see the same directory, by a file that the first one writes.

        Raises:
          RequestError: names a host that does not see it; or it cannot be written.
        """
        of_all = session.current()
        if of_all is None:
            return
        probe = self.path / f"{uuid.uuid4().hex[:8]}.shared"
        first = of_all.index == 0
        try:
            if first:
                files.replace(probe, "All hosts look for this file, and remove it.\n")
            name = of_all.gather("looking at the run directory", probe.name)[0]
            seen = of_all.gather("looking at the run directory", _appears(self.path / name))
        except OSError as error:
            raise config_lib.RequestError(
                f"{self.path} cannot be written: {error.strerror or error}"
            ) from error
        finally:
            if first:
                probe.unlink(missing_ok=True)
        if blind := [of_all.name(k) for k, sees in enumerate(seen) if not sees]:
            raise config_lib.RequestError(
                f"{self.path} is another directory on {', '.join(blind)}: all hosts need the same "
                "disk, or gs://"
            )

    def load_config(self) -> ml_collections.ConfigDict:
        """The run's config.

        Raises:
          RequestError: there is none.
        """
        if not self.config.exists():
            raise config_lib.RequestError(
                f"{self.path}: no run there (no config.json); train one first, "
                "or name the directory of a run"
            )
        try:
            return config_lib.from_json(files.read_text(self.config))
        except (ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise config_lib.RequestError(f"{self.config} is not a config: {reason}") from error

    def save_config(self, config: ml_collections.ConfigDict) -> None:
        """Saves the config, on the first host, where it is not the one there.

        Raises:
          RequestError: it cannot be written.
        """
        text = config_lib.to_json(config)
        try:
            if jax.process_index() != 0 or (
                self.config.exists() and files.read_text(self.config) == text
            ):
                return
            files.replace(self.config, text)
        except OSError as error:
            raise config_lib.RequestError(
                f"{self.path} cannot be written: {error.strerror or error}"
            ) from error

    def load_starts(self) -> list[dict[str, Any]]:
        """What was noted at each start of the training, see `note_start`; [] where nothing was.

        Raises:
          RequestError: the file is damaged.
        """
        try:
            starts = json.loads(files.read_text(self.provenance))
        except FileNotFoundError:
            return []
        except ValueError:
            starts = None
        if not isinstance(starts, list) or not all(map(_is_start, starts)):
            raise config_lib.RequestError(
                f"{self.provenance} is damaged: not a list of starts; move it away"
            )
        return starts

    def note_start(self, step: int) -> None:
        """Adds to provenance.json that the training starts here and now, to go on from `step`.

        A damaged file is kept as provenance.json.damaged.
        """
        try:
            starts = self.load_starts()
        except config_lib.RequestError:
            starts = []
            self.provenance.rename(files.unused(self.path / "provenance.json.damaged"))
        starts.append(manifest.start_provenance(step))
        files.replace(self.provenance, json.dumps(starts, indent=1, ensure_ascii=False) + "\n")

    def check_resumable(
        self,
        config: ml_collections.ConfigDict,
        force: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Refuses a config with which the run could not go on to the bit.

        Args:
          force: whether to accept it all the same.
          say: prints a line of what differs and is accepted.
        Raises:
          RequestError: lists the differences.
        """
        if not self.config.exists():
            return
        if force and (problem := self._damage()):
            say(f"--force: {problem}; it is written anew")
            return
        # A folder of images is known by its path alone.
        folder = config.data.name == "folder"
        free = [k for k in HARMLESS if not (folder and k == "data.data_dir")]
        try:
            self.check_same(config, free)
        except config_lib.RequestError as error:
            if not force:
                raise config_lib.RequestError(f"{error}, or start with --force") from None
        if say is not None and (changes := self.changes(config, ())):
            say(f"config changed since the last start: {'; '.join(changes)}")

    def _damage(self) -> str:
        """Why the saved config cannot be read; "" where it can."""
        try:
            self.load_config()
        except config_lib.RequestError as error:
            return str(error)
        return ""

    def check_same(self, config: ml_collections.ConfigDict, free: Sequence[str]) -> None:
        """Refuses a config that differs from the run's own, but in the keys or groups `free`.

        Raises:
          RequestError: lists the differences.
        """
        if differing := self.changes(config, free):
            raise config_lib.RequestError(
                f"{self.path} holds a run of another config: {'; '.join(differing)}; "
                "choose another --workdir, or go back to those values"
            )

    def changes(self, config: ml_collections.ConfigDict, free: Sequence[str]) -> list[str]:
        """What differs from the run's own config, in words, but for the keys or groups `free`."""
        saved = self.load_config()
        return [
            f"{key} was {config_lib.get(saved, key)}, is {config_lib.get(config, key)}"
            for key in config_lib.FIELDS
            if config_lib.get(saved, key) != config_lib.get(config, key)
            and key not in free
            and key.partition(".")[0] not in free
        ]


def _appears(path: epath.Path, seconds: float = SHARED_SECONDS) -> bool:
    """Whether a file is there, or comes: network disks may take a while to show it."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        files.matching(path.parent, path.name)  # Some look again when they are listed.
        time.sleep(0.1)
    return True


def _is_start(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("versions", {}), dict)


def make_model(config: ml_collections.ConfigDict) -> UNet:
    """The network that the config describes."""
    learned = config.diffusion.variance in ("learned", "learned_range")
    m = config.model
    return UNet(
        channels=m.channels,
        channel_multipliers=m.channel_multipliers,
        num_res_blocks=m.num_res_blocks,
        attention_resolutions=m.attention_resolutions,
        dropout=m.dropout,
        out_channels=config.data.channels * (2 if learned else 1),
        norm_groups=m.norm_groups,
        dtype=jax.numpy.dtype(m.dtype),
        remat=config.parallel.remat,
        winograd=config.parallel.winograd,
    )


def image_shape(config: ml_collections.ConfigDict) -> tuple[int, int, int]:
    """(height, width, channels) of the config's images."""
    return config.data.image_size, config.data.image_size, config.data.channels


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model, ready for use: `model.apply({"params": params}, x_t, t)`.

    Attributes:
      kind: "ema" or "raw", which parameters these are.
      rule: what chose the checkpoint: "newest", "step" or "best by <result>".
    """

    config: ml_collections.ConfigDict
    process: Process
    model: UNet
    params: Any
    step: int
    layout: Layout
    kind: str = "ema"
    rule: str = "newest"

    def apply(self, params: Any, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The network's output at parameters of this shape."""
        return self.model.apply({"params": params}, x_t, t)

    @property
    def params_sharding(self) -> Any:
        """How the parameters lie."""
        return jax.tree.map(lambda x: x.sharding, self.params)


def load(
    workdir: epath.PathLike,
    step: int | None = None,
    ema: bool = True,
    config: ml_collections.ConfigDict | None = None,
    best: bool = False,
) -> Run:
    """The model of a run, from its newest whole checkpoint.

    Args:
      workdir: the run's directory.
      step: the checkpoint wanted, instead of the newest.
      ema: the parameters' moving average, as in the paper, or the parameters themselves.
      config: instead of the run's own, where it differs in what `FOR_USE` names.
      best: the checkpoint with the best result (see `train.keep_best`), instead of the newest.
    Raises:
      RequestError: no run or no checkpoint there, or a config of another model.
      CheckpointError: the step does not exist, or all checkpoints are damaged.
    """
    directory = RunDirectory.of(workdir)
    config = config or directory.load_config()
    directory.check_same(config, FOR_USE)
    layout = make_layout("jit")
    model = make_model(config)
    abstract = jax.eval_shape(
        lambda: init_state(model, make_optimizer(config.train), image_shape(config), config.seed)
    )
    field = "ema_params" if ema else "params"
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.replicated),
        {field: getattr(abstract, field)},
    )
    where = directory.best / config.train.keep_best if best else directory.checkpoints
    if not where.exists() or (best and not config.train.keep_best):
        hint = "; name its result with train.keep_best, as when training" if best else ""
        what = "best checkpoint" if best else "checkpoint yet"
        raise config_lib.RequestError(f"{workdir}: the run has no {what}{hint}")
    checkpoints = Checkpoints(where)
    try:
        found = checkpoints.restore(wanted, step)
    finally:
        checkpoints.close()
    if found is None:
        raise config_lib.RequestError(f"{workdir}: the run has no checkpoint yet")
    state, at_step, notes = found
    rule = f"best by {notes['result']}" if best else "newest" if step is None else "step"
    kind = "ema" if ema else "raw"
    process = config_lib.make_process(config)
    return Run(config, process, model, state[field], at_step, layout, kind, rule)


def fingerprint(params: Any) -> str:
    """CRC-32 of all leaves of the parameters, in the order of their names, as hexadecimal."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    ordered = sorted(leaves, key=lambda leaf: jax.tree_util.keystr(leaf[0]))
    crc = 0
    for _, leaf in ordered:
        crc = zlib.crc32(to_host(leaf).tobytes(), crc)
    return f"{crc:08x}"
