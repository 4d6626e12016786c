"""--mode=check: what a config means, without training: shapes, parameters, memory, FLOPs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from ddpm_jax import config as config_lib
from ddpm_jax import likelihood
from ddpm_jax.data import open_source
from ddpm_jax.parallel import compile_call, in_one_piece
from ddpm_jax.runs import image_shape
from ddpm_jax.schedules import Schedule
from ddpm_jax.training.job import Job, make_job
from ddpm_jax.training.step import train_call, train_step


def report(config: ml_collections.ConfigDict) -> str:
    """The resolved config, tensor shapes, parameters, and the compiled step's memory and FLOPs.

    Raises:
      RequestError: data or devices do not fit the config.
    """
    job = make_job(config)
    source = open_source(config, batch_size=config.train.batch_size)
    lines = [f"{key} = {config_lib.get(config, key)}" for key in config_lib.FIELDS]
    lines.append("")
    lines.append(f"data: {source.name}/{source.split}, {len(source):,} images {source.image_shape}")
    lines += _schedule_lines(job.task.process.schedule)
    lines.append("parameters:")
    leaves = jax.tree_util.tree_leaves_with_path(job.abstract.params)
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        lines.append(f"  {name:48} {'×'.join(map(str, leaf.shape))}")
    lines.append(f"parameters in all: {sum(leaf.size for _, leaf in leaves):,}")
    lines += _cost_lines(job)
    return "\n".join(lines)


def _schedule_lines(schedule: Schedule) -> list[str]:
    prior = float(likelihood.prior_term(schedule, jnp.ones((1, 1)))[0])
    line = f"diffusion: T = {schedule.num_steps}, ᾱ_T = {float(schedule.alpha_bar[-1]):.3g}, "
    line += f"L_T ≤ {prior:.3g} bits/dim"
    if prior > 0.01:
        line += "; x_T is far from N(0, I): more steps or larger betas are needed"
    return [line]


def lowered_step(job: Job) -> jax.stages.Lowered:
    """An optimizer step on all devices together, as it is written: the program that TPUs get.

    CPUs run convolutions with fewer multiplications.
    """
    # One step without loops, of which XLA would count a single round.
    whole = dataclasses.replace(job.task, microbatches=1)
    batch = jax.ShapeDtypeStruct((job.config.train.batch_size, *image_shape(job.config)), jnp.uint8)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), job.abstract)
    with in_one_piece():
        step = jax.jit(functools.partial(train_step, whole)).trace(shapes, batch)
    return step.lower(lowering_platforms=("tpu",))


def step_flops(job: Job) -> float:
    """The floating-point operations of `lowered_step`, before the compiler's optimisations.

    JAX counts them on CPUs alone; NaN where JAX_PLATFORMS leaves these out.
    """
    try:
        counting = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return math.nan
    with jax.default_device(counting):
        return lowered_step(job).cost_analysis()["flops"]


def counted(flops: float, text: str) -> str:
    """The text, or that these could not be counted, where `step_flops` found no CPU."""
    return "no CPU to count FLOPs on" if math.isnan(flops) else text


@dataclasses.dataclass(frozen=True)
class Memory:
    """What training holds on each device while it makes a step, in bytes.

    Attributes:
      params, ema_params, optimizer: the parts of the state, as they lie.
      images: the batches of a call.
      temporary: all else that the compiled program takes: activations, gradients, under fsdp the
        parameters gathered, and so on.
      reused: what the program overwrites with its results: the whole state.
    """

    params: int
    ema_params: int
    optimizer: int
    images: int
    temporary: int
    reused: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.params + self.ema_params + self.optimizer + self.images + self.temporary


def memory(job: Job, options: Mapping[str, Any] | None = None) -> Memory:
    """The memory of a device, from the program of a call, which is compiled for it.

    Args:
      options: the compiler's.
    """
    images = job.images
    call = compile_call(job.layout, functools.partial(train_call, job.task), job.sharding)
    needs = call.lower(job.abstract, images).compile(options).memory_analysis()
    state = job.abstract
    parts = (state.params, state.ema_params, state.opt_state, images)
    return Memory(*map(_bytes_a_device, parts), needs.temp_size_in_bytes, needs.alias_size_in_bytes)


def _bytes_a_device(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _cost_lines(job: Job) -> list[str]:
    batch = list(job.images.shape)
    needs, flops = memory(job), step_flops(job)
    parts = job.task.microbatches
    dealt = f", in {parts} parts one after another (parallel.microbatches)" if parts > 1 else ""
    return [
        f"batch: uint8 {batch}, split over {job.layout.num_devices} devices{dealt}",
        f"state: {_bytes_a_device(job.abstract) / 2**20:,.1f} MiB a device",
        f"step: {counted(flops, f'{flops / 1e9:,.2f} GFLOP')}, on all devices together",
        f"step: {needs.temporary / 2**20:,.1f} MiB of temporary memory a device",
    ]
