"""What a run is made of, from its config, before anything is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax.evaluation import names
from ddpm_jax.parallel import Layout, make_layout, once_jit, trim_memory, uncollected
from ddpm_jax.runs import Run, image_shape, make_model
from ddpm_jax.training.state import State, init_state, make_optimizer
from ddpm_jax.training.step import Task

# What a part of a batch has at least, by measurement: bytes of its first maps, of the size of a
# core's cache, and images, over which the kernels' gradients sum.
PART_BYTES, PART_IMAGES = 2**20, 8
NARROW = 64  # model.channels, at most.


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run needs, made from its config: nothing here changes while it trains."""

    config: ml_collections.ConfigDict
    layout: Layout
    task: Task
    abstract: State  # Shapes, dtypes and shardings of the state.
    initial: Callable[[jax.Array], State]  # `initial_state`, traced once for shapes and values.

    @property
    def sharding(self) -> State:
        """The sharding of each leaf of the state."""
        return jax.tree.map(lambda x: x.sharding, self.abstract)

    @property
    def images(self) -> jax.ShapeDtypeStruct:
        """The batches of a call, uint8 [steps, batch, height, width, channels], as they lie."""
        train = self.config.train
        shape = (train.steps_per_call, train.batch_size, *image_shape(self.config))
        return jax.ShapeDtypeStruct(shape, np.uint8, sharding=self.layout.split(1))

    def start(self) -> State:
        """The state before the first step, where it lies."""
        return self.prepare_start()()

    def prepare_start(self) -> Callable[[], State]:
        """`start`, compiled."""
        seed = np.int32(self.config.seed)
        with uncollected():
            lowered = once_jit(self.initial, out_shardings=self.sharding).lower(seed)
        compiled = lowered.compile()
        del lowered

        def start() -> State:
            state = jax.block_until_ready(compiled(seed))
            trim_memory()  # The draws' own, which is as much as a step will need.
            return state

        return start


def make_job(config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> Job:
    """The job of a valid config on these devices, or else on all there are; nothing is compiled.

    Raises:
      RequestError: the batch does not divide over the devices.
    """
    layout = make_layout(config.parallel.mode, devices)
    try:
        names.check_keep_best(config)
    except ValueError as error:
        raise config_lib.RequestError(f"config.{error}") from None
    parts = microbatches(config, layout)
    if config.train.batch_size % (layout.num_devices * parts):
        raise config_lib.RequestError(
            f"config.train.batch_size={config.train.batch_size} does not divide by "
            f"{layout.num_devices * parts}: {layout.num_devices} devices × {parts} microbatches"
        )
    task = Task(
        model=make_model(config),
        process=config_lib.make_process(config),
        optimizer=make_optimizer(config.train),
        train=config.train,
        flip=config.data.flip,
        seed=config.seed,
        microbatches=parts,
        skip_nonfinite=config.train.nonfinite == "skip",
    )
    initial = jax.jit(initial_state(config, task))
    with uncollected():
        shapes = jax.eval_shape(initial, np.int32(0))  # Traced here, once for all.
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        layout.state(shapes),
    )
    return Job(config, layout, task, abstract, initial)


def microbatches(config: ml_collections.ConfigDict, layout: Layout) -> int:
    """parallel.microbatches, or how many parts are likely to make a step shortest where it is 0.

    One but on a single CPU device: there what lies between the convolutions of a narrow network
    waits for memory, the more, the less of its maps the cores' caches hold. As many parts, then,
    as divide the batch and leave each PART_IMAGES and PART_BYTES. Wide networks would only pay
    for adding up more gradients.
    """
    if config.parallel.microbatches:
        return config.parallel.microbatches
    on_one_cpu = layout.num_devices == 1 and layout.mesh.devices.item().platform == "cpu"
    if not on_one_cpu or config.model.channels > NARROW:
        return 1
    batch = config.train.batch_size
    size = batch * config.data.image_size**2 * config.model.channels
    size *= jnp.dtype(config.model.dtype).itemsize
    most = min(batch // PART_IMAGES, size // PART_BYTES)
    return next((parts for parts in range(most, 1, -1) if batch % parts == 0), 1)


def initial_state(
    config: ml_collections.ConfigDict, task: Task
) -> Callable[[int | jax.Array], State]:
    """Makes the state before the first step from the seed, to be run under jit.

    The seed is an argument, so that runs which differ in it find one compiled program in the cache.
    """
    return lambda seed: init_state(task.model, task.optimizer, image_shape(config), seed)


def template(job: Job) -> Run:
    """The run that evaluators are built for: its parameters are but their shapes and shardings."""
    ema = job.config.evaluation.ema
    return Run(
        config=job.config,
        process=job.task.process,
        model=job.task.model,
        params=job.abstract.ema_params if ema else job.abstract.params,
        step=0,
        layout=job.layout,
        kind="ema" if ema else "raw",
    )
