"""--mode=verify: are a run's checkpoints whole, and does this machine keep a run's numbers?

Every checkpoint is read and held against its checksums. Then some steps are trained from the newest
one, in memory and in a temporary directory: twice, with a save and a restore between them, and on
every layout that these devices allow. The first two must agree to the bit. Layouts sum in another
order, and may differ by what rounding makes of a few steps, which is measured: parameters are moved
to a neighbouring float32 before each step.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from ddpm_jax import config as config_lib
from ddpm_jax import files
from ddpm_jax.config import RequestError
from ddpm_jax.data import Batches, Source, fingerprint, nbytes, open_source, resident_gather
from ddpm_jax.parallel import compile_call, from_host, to_host
from ddpm_jax.runs import RunDirectory
from ddpm_jax.training import goodput
from ddpm_jax.training.checkpoints import Checkpoints
from ddpm_jax.training.job import Job, make_job
from ddpm_jax.training.state import State
from ddpm_jax.training.step import seeded_call

CALLS, STEPS = 2, 4  # At least, on each side of the save.
SHAKEN = 3  # Runs whose parameters are moved.
WITHIN = 8.0  # Times the distance of the shaken runs.
CPU_DEVICES = 4  # Virtual ones, where there is but one CPU.


def verify(
    config: ml_collections.ConfigDict,
    workdir: str,
    say: Callable[[str], None],
    devices: Sequence[jax.Device] | None = None,
) -> bool:
    """Whether every checkpoint of a run is whole and the numbers are kept; each is said in a line.

    Nothing is written into the run's directory.

    Args:
      config: the run's own, or one that it could go on under.
      workdir: the run's directory.
      say: prints a line.
      devices: those that the run would have; all, unless given.
    Raises:
      RequestError: no run there; data or devices do not fit the config.
    """
    directory = RunDirectory.of(workdir)
    directory.load_config()
    directory.check_resumable(config)
    job = make_job(config, devices)
    source = open_source(config, batch_size=config.train.batch_size)
    state, whole = _check_checkpoints(job, directory, fingerprint(source), say)
    if state is None:
        if any(life.reached > 0 for life in goodput.read(directory.goodput)):
            say("NO WHOLE CHECKPOINT of a run that has come further than its start")
            whole = False
        say("there is no checkpoint to begin from: the steps are trained from the start")
        state = job.start()
    kept = _check_numbers(job, source, state, say)
    say("all is well" if whole and kept else "NOT all is well: see above")
    return whole and kept


def _check_checkpoints(
    job: Job, directory: RunDirectory, data: str, say: Callable[[str], None]
) -> tuple[State | None, bool]:
    """The newest whole state, and whether all checkpoints are whole and of these images."""
    newest, bad, seen = None, 0, 0
    for where, abstract in _places(job, directory):
        checkpoints = Checkpoints(where)
        try:
            for step in checkpoints.steps():
                began, seen = time.monotonic(), seen + 1
                found, reason = checkpoints.attempt(step, abstract)
                path = f"{where.relative_to(directory.path)}/{step}"
                if found is None and step not in checkpoints.steps():
                    seen -= 1
                    say(f"{path}: removed meanwhile, by a training that goes on")
                    continue
                if found is None:
                    bad += 1
                    say(f"{path}: DAMAGED: {reason}")
                    continue
                if found[1].get("data", data) != data:
                    bad += 1
                    say(f"{path}: OF OTHER IMAGES, whose fingerprint is {found[1]['data']}: {data}")
                leaves = jax.tree.leaves(found[0])
                size = sum(leaf.nbytes for leaf in leaves) / 2**20
                seconds = time.monotonic() - began
                say(f"{path}: whole ({len(leaves)} leaves, {size:,.1f} MiB, {seconds:.1f} s)")
                if newest is None and where == directory.checkpoints:
                    newest = found[0]
        finally:
            checkpoints.close()
    say(f"{seen} checkpoints, {bad} damaged")
    return newest, not bad


def _places(job: Job, directory: RunDirectory) -> Iterator[tuple[epath.Path, Any]]:
    """The directories of checkpoints, with the shapes of what is in them."""
    if directory.checkpoints.exists():
        yield directory.checkpoints, job.abstract
    best = {"ema_params": job.abstract.ema_params, "params": job.abstract.params}
    for path in files.matching(directory.best, "*"):
        yield path, best


def _check_numbers(job: Job, source: Source, state: State, say: Callable[[str], None]) -> bool:
    """Whether repetition, a restore and other layouts give the same steps."""
    start, first = jax.tree.map(to_host, state), int(state.step)
    per_call = job.config.train.steps_per_call
    side = max(CALLS, STEPS // per_call) * per_call
    half, last = first + side, first + 2 * side
    train = _trainer(job, source)
    middle = train(_laid(job, start), first, half)
    with tempfile.TemporaryDirectory(prefix="ddpm_jax_verify_") as folder:
        restored = _saved_and_restored(job, middle, folder if jax.process_count() == 1 else None)
    straight = _numbers(train(_laid(job, start), first, last))
    again = _numbers(train(_laid(job, start), first, last))
    resumed = _numbers(train(restored, half, last))
    sound = _say_equal(f"steps {first} to {last}, trained twice", straight, again, say)
    sound &= _say_equal(f"the same, saved and restored at {half}", straight, resumed, say)
    shaken = [
        _distances(_numbers(train(_laid(job, start), first, last, key)), straight)
        for key in jax.random.split(jax.random.key(0), SHAKEN)
    ]
    allowed = {name: max(each[name] for each in shaken) for name in straight}
    for title, other in _others(job):
        theirs = _numbers(_trainer(other, source)(_laid(other, start), first, last))
        found = _distances(theirs, straight)
        ratios = {
            name: distance / allowed[name] if allowed[name] else float(distance > 0) * np.inf
            for name, distance in found.items()
            if distance
        }
        worst = max(ratios, key=ratios.get) if ratios else "no leaf"
        ratio = ratios.get(worst, 0.0)
        within = ratio <= WITHIN
        say(
            f"{title}: {'the same' if within else 'DIFFERS'}, at most {ratio:.2g} times the "
            f"distance of rounding alone ({worst}; allowed {WITHIN:g})"
        )
        sound &= within
    return sound


def _say_equal(
    title: str, one: dict[str, np.ndarray], other: dict[str, np.ndarray], say: Callable[[str], None]
) -> bool:
    wrong = [name for name, value in one.items() if not np.array_equal(value, other[name])]
    say(f"{title}: {f'DIFFERS in {wrong[0]}' if wrong else 'equal to the bit'}")
    return not wrong


def _trainer(job: Job, source: Source) -> Callable[..., State]:
    """`train(state, first, last, shake=None)`: the state after these steps, `state` is given up."""
    shardings = job.layout.replicated, job.sharding
    program = compile_call(job.layout, functools.partial(seeded_call, job.task), shardings)
    shaking = jax.jit(_shaken, out_shardings=job.sharding)
    split = job.layout.split(1)
    resident: Any = nbytes(source) <= job.config.data.resident_bytes
    resident = resident and resident_gather(source, split)
    train, seed = job.config.train, np.int32(job.config.seed)

    def run(state: State, first: int, last: int, shake: jax.Array | None = None) -> State:
        sizes = train.batch_size, train.steps_per_call
        with Batches(source, job.config.seed, *sizes, split, resident) as batches:
            for step in range(first, last, train.steps_per_call):
                if shake is not None:
                    state = shaking(shake, state)
                (_, state), _ = program((seed, state), batches(step))
        return state

    return run


def _shaken(key: jax.Array, state: State) -> State:
    """The state with each parameter moved to one of its two neighbours, by chance."""
    leaves, structure = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.fold_in(key, state.step), len(leaves))
    moved = [
        jnp.nextafter(x, jnp.where(jax.random.bernoulli(k, shape=x.shape), jnp.inf, -jnp.inf))
        for x, k in zip(leaves, keys, strict=True)
    ]
    return dataclasses.replace(state, params=jax.tree.unflatten(structure, moved))


def _saved_and_restored(job: Job, state: State, folder: str | None) -> State:
    """The state by way of a disk; of memory on several hosts, which may have no disk in common."""
    if folder is None:
        return jax.tree.map(from_host, jax.tree.map(to_host, state), job.sharding)
    checkpoints = Checkpoints(folder)
    try:
        checkpoints.save(int(state.step), state, {})
        checkpoints.wait()
        restored = checkpoints.restore(job.abstract)
    finally:
        checkpoints.close()
    return restored[0]


def _others(job: Job) -> Iterator[tuple[str, Job]]:
    """Other layouts of the same steps: every mode, one device and all of them, microbatches."""
    devices = jax.devices()
    own = (job.layout.mode, job.layout.num_devices, job.task.microbatches)
    least = 1 if jax.process_count() == 1 else len(devices)
    layouts = {("jit", least, 1): None}  # A set that keeps its order.
    modes = config_lib.FIELDS["parallel.mode"].choices
    layouts |= dict.fromkeys((mode, len(devices), 2 if mode == "jit" else 1) for mode in modes)
    for mode, count, parts in layouts:
        if (mode, count, parts) == own:
            continue
        config = copy.deepcopy(job.config)
        config.parallel.mode, config.parallel.microbatches = mode, parts
        try:
            other = make_job(config, devices[:count])
        except RequestError:  # The batch does not divide.
            continue
        title = f"{mode} on {count} {devices[0].device_kind}"
        yield title + (f" in {parts} microbatches" if parts > 1 else ""), other


def _laid(job: Job, state: Any) -> State:
    """A state of the host on the devices, as the job wants it."""
    return jax.tree.map(from_host, state, job.sharding)


def _numbers(state: State) -> dict[str, np.ndarray]:
    """Parameters and average by name, on the host."""
    leaves = jax.tree_util.tree_leaves_with_path({"params": state.params, "ema": state.ema_params})
    return {jax.tree_util.keystr(p, simple=True, separator="/"): to_host(x) for p, x in leaves}


def _distances(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest difference of each leaf; infinite where one is not a number."""
    found = {name: float(np.abs(x - other[name]).max()) for name, x in one.items()}
    return {name: np.inf if np.isnan(distance) else distance for name, distance in found.items()}


def use_several_cpu_devices(environment: Mapping[str, str]) -> bool:
    """Lets a CPU be several devices, so that layouts can be compared; before JAX touches any.

    Returns:
      Whether it does, and a run would have the first of these devices alone.
    """
    told = "xla_force_host_platform_device_count" in environment.get("XLA_FLAGS", "")
    if told or jax.distributed.is_initialized():
        return False
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
    return jax.default_backend() == "cpu"
