"""Contestants side by side: each in a process of its own, measured in turn, compared in pairs."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ddpm_jax import interop
from ddpm_jax.config import RequestError, make_schedule
from ddpm_jax.runs import image_shape, make_model
from experiments.speeding.server import Worker, WorkerError
from experiments.speeding.workloads import Workload

OURS = "ours"
KINDS, OPTIONS = (OURS, "diffusers", "lucidrains"), ("compile", "channels_last", "bf16")
SECONDS = 5.0  # Of a contestant in a round.
CHAIN = 10  # Steps of the chains by which a sampling step is timed.
MATRIX = {False: (2048, 1), True: (8192, 20)}  # On CPUs, on accelerators: size, products.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # Of losses at equal weights and inputs.


def contestants(on_accelerator: bool) -> tuple[str, ...]:
    """The names of those that are measured unless others are asked for, ours first."""
    if on_accelerator:
        fast = "+channels_last+bf16"
        return ("ours+bf16", OURS, f"diffusers{fast}", f"diffusers+compile{fast}", "lucidrains")
    return OURS, "diffusers", "diffusers+compile", "diffusers+channels_last+bf16", "lucidrains"


def check_names(names: Sequence[str]) -> None:
    """Refuses contestants that nobody knows.

    Raises:
      RequestError: names one of them, or one comes twice, or ours is not the first.
    """
    for name in names:
        kind, *options = name.split("+")
        known = OPTIONS if kind != OURS else ("bf16",)  # XLA compiles in any case, and lays out.
        if kind not in KINDS or not {*options} <= {*known}:
            raise RequestError(
                f"--contestants={name}: choose from ours, ours+bf16, and diffusers or lucidrains "
                f"with any of {', '.join(f'+{option}' for option in OPTIONS)}"
            )
    if len(set(names)) < len(names):
        raise RequestError("--contestants: each must be named once")
    if names[0].split("+")[0] != OURS:
        raise RequestError("--contestants: ours goes first")


def dtype_of(name: str) -> str:
    """A contestant's dtype of computation."""
    return "bfloat16" if "bf16" in name.split("+") else "float32"


def start(name: str, workload: Workload, cache: pathlib.Path) -> Worker:
    """The contestant's process.

    Args:
      cache: where its compiler keeps what it has compiled.
    """
    kind, *_ = name.split("+")
    if kind == OURS:
        workload = dataclasses.replace(workload, dtype=dtype_of(name))
        module, arguments = "experiments.speeding.ours", [workload.to_json()]
    else:
        module = "experiments.speeding.torch_peers"
        arguments = [name, json.dumps(specification(workload))]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # Several share an accelerator.
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return Worker(module, arguments, environment)


def specification(workload: Workload) -> dict[str, Any]:
    """What a peer must know of a workload, as JSON can say it."""
    config = workload.config
    shape, model, train = image_shape(config), config.model, config.train
    return {
        "network": interop.diffusers_config(make_model(config), shape),
        "weights": interop.WEIGHTS_FILE,
        "shape": shape,
        "batch": workload.batch,
        "samples": config.sample.batch_size,
        "beta": np.asarray(make_schedule(config).beta, np.float64).tolist(),  # At 0..T.
        "num_steps": config.diffusion.num_steps,
        "flip": config.data.flip,
        **{key: model[key] for key in ("channels", "channel_multipliers", "dropout")},
        **{key: train[key] for key in ("learning_rate", "clip_norm", "ema_decay")},
    }


@dataclasses.dataclass
class Result:
    """What was measured of a contestant; seconds a step, one a round.

    Attributes:
      cold, warm: seconds from the start of the process to the end of its first training step,
        with nothing compiled before and with all of it.
      memory: bytes, at most, of a process that trains and does nothing else.
      loss: at the weights and inputs that all share.
    """

    name: str
    about: dict[str, Any]
    loss: float | None
    cold: float
    warm: float
    memory: int
    train: list[float] = dataclasses.field(default_factory=list)
    sample: list[float] = dataclasses.field(default_factory=list)
    chain: list[float] = dataclasses.field(default_factory=list)
    evaluate: list[float] = dataclasses.field(default_factory=list)
    matrix: list[float] = dataclasses.field(default_factory=list)


class DifferentWorkError(RuntimeError):
    """A contestant computes something else, so that times do not compare."""


def compete(
    workload: Workload,
    names: Sequence[str],
    what: Iterable[str],
    rounds: int,
    say: Callable[[str], None],
) -> Iterator[tuple[list[Result], dict[str, float]]]:
    """Measures contestants in turn, in another order each round.

    Args:
      names: of contestants, ours among them.
      what: of train, sample, chain.
      say: prints a line; peers that cannot run are named, and left out.
    Yields:
      The results so far, after each of `what`, and our work's FLOPs of a training and a sampling
      step.
    Raises:
      DifferentWorkError: losses at equal weights and inputs differ.
      WorkerError: ours cannot run, or a contestant ended among the rounds.
    """
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        workers, results, flops = {}, {}, {}
        try:
            for name in names:
                try:
                    workers[name], results[name] = _started(name, workload, place)
                except WorkerError as error:
                    if name.startswith(OURS):
                        raise
                    missing = "No module" in str(error)
                    hint = "; pip install 'ddpm_jax[benchmark]'" if missing else ""
                    say(f"{name}: cannot run: {error}{hint}")
                    continue
                if name.startswith(OURS) and not flops:
                    flops = workers[name].ask("flops")
                one = results[name]
                say(f"{name}: first step after {one.cold:.1f} s, then {one.warm:.1f} s")
            check_equal_work(results.values())
            for job in what:
                _rounds(job, workload, workers, results, rounds, say)
                yield list(results.values()), flops
        finally:
            for worker in workers.values():
                worker.close()


def _started(name: str, workload: Workload, place: pathlib.Path) -> tuple[Worker, Result]:
    cache = place / "cache" / name
    seconds = []
    for _ in range(2):  # The second finds compiled what the first has compiled.
        worker = start(name, workload, cache)
        try:
            worker.ask("train", steps=1)
            seconds.append(worker.seconds)
            worker.ask("train", steps=2)
            memory = worker.ask("memory")  # Before anything but training is asked for.
        except WorkerError:
            worker.close()
            raise
        if len(seconds) == 1:
            worker.close()
    weights = place / "weights"
    if not weights.exists() and name.startswith(OURS):
        worker.ask("write_weights", directory=str(weights))
        _write_inputs(weights, workload)
    loss = worker.ask("loss", directory=str(weights)) if weights.exists() else None
    return worker, Result(name, worker.ask("describe"), loss, *seconds, memory)


def _write_inputs(directory: pathlib.Path, workload: Workload) -> None:
    config, draw = workload.config, np.random.default_rng(2)
    shape = workload.batch, *image_shape(config)
    np.savez(
        directory / "inputs.npz",
        images=draw.integers(0, 256, shape, np.uint8),
        t=draw.integers(1, config.diffusion.num_steps + 1, workload.batch, np.int32),
        noise=draw.standard_normal(shape, np.float32),
    )


def check_equal_work(results: Iterable[Result]) -> None:
    """Checks the devices of all contestants, losses and parameters of those of the same network.

    Raises:
      DifferentWorkError: one of them differs from the first.
    """
    results = list(results)
    for one in results:
        platforms = [each.about["platform"] for each in (one, results[0])]
        if platforms[0] != platforms[1]:
            raise DifferentWorkError(
                f"{one.name} runs on a {platforms[0]}, {results[0].name} on a {platforms[1]}: "
                "install builds for the same device, or leave it out of --contestants"
            )
    same = [one for one in results if one.loss is not None]
    for one in same:
        first = same[0]
        bound = max(TOLERANCE[dtype_of(one.name)], TOLERANCE[dtype_of(first.name)])
        sizes = [each.about["parameters"] for each in (one, first)]
        if sizes[0] != sizes[1]:
            raise DifferentWorkError(
                f"{one.name} has {sizes[0]:,} parameters, {first.name} {sizes[1]:,}"
            )
        if not abs(one.loss - first.loss) <= bound * abs(first.loss):
            raise DifferentWorkError(
                f"at equal weights and inputs the loss of {one.name} is {one.loss:.7g}, that of "
                f"{first.name} {first.loss:.7g}"
            )


def _rounds(
    job: str,
    workload: Workload,
    workers: Mapping[str, Worker],
    results: Mapping[str, Result],
    rounds: int,
    say: Callable[[str], None],
) -> None:
    """Fills in `results[…].job`; what else is timed goes with it."""
    steps = {}
    names = list(workers)
    whole = workload.config.diffusion.num_steps
    for name in names:  # Compiled, and warmed up.
        if job == "train":
            one = workers[name].ask("train", steps=3)
            steps[name] = max(1, round(SECONDS / one))
        else:
            steps[name] = CHAIN if job == "sample" else whole
            ours = name.startswith(OURS)  # A chain of ours is one program, by its length.
            workers[name].ask("sample", steps=steps[name] if ours else CHAIN)
            if ours and job == "sample":
                workers[name].ask("evaluate", steps=CHAIN)
    for turn in range(rounds if job != "chain" else max(1, rounds // 3)):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            worker, result = workers[name], results[name]
            # What was idle has lost its place in caches, perhaps in memory.
            if job == "train":
                worker.ask("train", steps=1)
                result.train.append(worker.ask("train", steps=steps[name]))
                n, products = MATRIX[result.about["platform"] != "cpu"]
                result.matrix.append(worker.ask("matrix", n=n, products=products))
            elif job == "sample":
                worker.ask("sample", steps=steps[name])
                result.sample.append(_mean(worker, "sample", steps[name]))
                if name.startswith(OURS):
                    result.evaluate.append(_mean(worker, "evaluate", steps[name]))
            else:
                result.chain.append(worker.ask("sample", steps=steps[name]))
        say(
            f"{workload.network} {job}, round {turn + 1}: "
            + ", ".join(f"{name} {getattr(results[name], job)[-1]:.4g} s" for name in names)
        )


def _mean(worker: Worker, what: str, steps: int) -> float:
    """Seconds a step, over chains of so many that take SECONDS or more."""
    seconds = [worker.ask(what, steps=steps)]
    while sum(seconds) * steps < SECONDS:
        seconds.append(worker.ask(what, steps=steps))
    return statistics.mean(seconds)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """ours / theirs of each round: median, smallest, largest."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)
