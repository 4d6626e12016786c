"""Devices: the mesh, how state and batches lie on it, and the compilation of one step over it.

`jit` replicates the parameters and splits the batch; `fsdp` splits parameters, average and
optimizer state as well; `pmap` runs the same step as one program a device. The numbers are the
same to rounding.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import dataclasses
import functools
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jaxlib.version
import numpy as np
from jax.experimental.layout import Layout as ArrayLayout
from jax.experimental.layout import with_layout_constraint
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
# What networks are compiled with; pmap's programs cannot be told.
# On CPUs the library YNN gets convolutions and reductions, too. With matrix products alone networks
# take two thirds of the time by jaxlib 0.10. By 0.11 the paper's takes 1.47 s a step with them and
# 1.64 without, on two cores of an Intel Xeon; the digits' 0.068 and 0.061.
_YNN_MULTIPLIES = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
WIDE = 128  # A network is wide if a 3×3 kernel has more channels than this, in and out.
# By default 0.10 drops barriers, and keeps what the way back was to compute again.
_BY_0_10 = _YNN_MULTIPLIES | {"xla_disable_hlo_passes": "cse_barrier_expander"}
# On GPUs no sum's order is left to chance, for a hundredth of the time: bits stay the same.
_ON_GPUS = {"xla_gpu_exclude_nondeterministic_ops": True}
_one_piece = contextvars.ContextVar("one piece", default=False)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a run lies on the devices of all hosts: a mode and a mesh with the one axis AXIS."""

    mode: str
    mesh: Mesh

    @property
    def num_devices(self) -> int:
        """The devices of all hosts."""
        return self.mesh.size

    @property
    def replicated(self) -> NamedSharding:
        """The whole array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def split(self, axis: int) -> NamedSharding:
        """One axis split over the devices."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXIS))

    def state(self, abstract: Any) -> Any:
        """The sharding of each leaf of a state: replicated, or split where the mode is fsdp.

        fsdp splits a leaf along its largest axis that the number of devices divides.
        """

        def leaf(x: Any) -> NamedSharding:
            axes = [i for i, n in enumerate(x.shape) if n and n % self.num_devices == 0]
            if self.mode != "fsdp" or not axes:
                return self.replicated
            return self.split(max(axes, key=lambda i: x.shape[i]))

        return jax.tree.map(leaf, abstract)


def make_layout(mode: str, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The layout over these devices, or else over those of all hosts, one host after another."""
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: device.process_index)
    return Layout(mode, Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,)))


def _cpu_compiler_is_known() -> bool:
    """Whether programs are for CPUs, by a compiler whose settings are known here."""
    known = jaxlib.version.__version__.startswith(("0.10.", "0.11."))
    return jax.default_backend() == "cpu" and known


def _compiler_options(wide: bool) -> dict[str, Any]:
    """For the network of a program; XLA_FLAGS that name an option are left to say otherwise."""
    options = {}
    if jax.default_backend() == "gpu":
        options = _ON_GPUS
    elif _cpu_compiler_is_known() and jaxlib.version.__version__.startswith("0.10."):
        options = _BY_0_10
    elif _cpu_compiler_is_known() and wide:
        options = _YNN_MULTIPLIES
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in flags}


def network_jit(function: Callable[..., Any], **how: Any) -> jax.stages.Wrapped | _ByWidth:
    """`jax.jit` of a function with the network in it, with the compiler's fastest settings.

    Args:
      function: the network's parameters are among its arguments.
      how: of `jax.jit`.
    """
    narrow, wide = (
        functools.partial(jax.jit, function, compiler_options=_compiler_options(wide), **how)
        for wide in (False, True)
    )
    same = narrow.keywords == wide.keywords
    return wide() if same else _ByWidth(narrow(), wide())


@dataclasses.dataclass(frozen=True)
class _ByWidth:
    """The one or the other program, by the convolutions' kernels among the arguments."""

    narrow: jax.stages.Wrapped
    wide: jax.stages.Wrapped

    def _program(self, arguments: Any) -> jax.stages.Wrapped:
        shapes = [x.shape for x in jax.tree.leaves(arguments) if np.ndim(x) == 4]
        widths = [min(shape[2:]) for shape in shapes if shape[:2] == (3, 3)]
        return self.narrow if widths and max(widths) <= WIDE else self.wide

    def __call__(self, *arguments: Any) -> Any:
        return self._program(arguments)(*arguments)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """As `jax.jit`'s."""
        return self._program(arguments).lower(*arguments)


@contextlib.contextmanager
def in_one_piece() -> Iterator[None]:
    """Nothing of programs that are traced meanwhile is kept apart: they are for other platforms."""
    token = _one_piece.set(True)
    try:
        yield
    finally:
        _one_piece.reset(token)


def apart(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """`jax.jit` of a part of a program, which a CPU keeps apart from the rest of it.

    The time in which it loads a program from the cache grows with the square of its length. What
    is on both sides of the border is not fused, nor is memory that was donated used across it.
    With several devices nothing is apart: sums over them are put together across a whole program.

    Args:
      function: of positional arguments; returns arrays, of which the first is used.
      how: of `jax.jit`.
    """
    jitted = jax.jit(function, **how)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        out = jitted(*arguments)
        if _one_piece.get() or not _cpu_compiler_is_known() or jax.device_count() > 1:
            return out
        (first, *others), tree = jax.tree.flatten(out)
        # What marks a value marks the call that it comes from.
        return tree.unflatten([set_xla_metadata(first, inlineable="false"), *others])

    return call


def once_jit(function: Callable[..., Any], **how: Any) -> jax.stages.Wrapped:
    """`jax.jit` of what runs once: most of the compiler's work would take longer than it saves.

    Args:
      how: of `jax.jit`.
    """
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 1}, **how)


def as_stored(tree: Any) -> Any:
    """Arrays, which GPUs lay out as they do what is kept between programs: row by row.

    The gradients of convolutions' kernels lie in another order there, in which else the update
    reads and writes all that belongs to a kernel: twice as slowly, and not in place.
    """
    leaves, structure = jax.tree.flatten(tree)

    def constrained(*leaves: jax.Array) -> list[jax.Array]:
        return [with_layout_constraint(x, ArrayLayout(tuple(range(x.ndim)))) for x in leaves]

    def unchanged(*leaves: jax.Array) -> list[jax.Array]:
        return list(leaves)

    on_gpus = {"cuda": constrained, "rocm": constrained}
    return structure.unflatten(jax.lax.platform_dependent(*leaves, **on_gpus, default=unchanged))


def compile_call(
    layout: Layout, call: Callable[..., tuple[Any, Any]], state_sharding: Any
) -> _Compiled | _Mapped:
    """`call(state, images, axis_name=…) -> (state, metrics)`, compiled over the devices.

    The result takes the state in `state_sharding` (donated) and images [steps, batch, ...] in
    `layout.split(1)`, of one shape, and returns the new state and replicated metrics. Its `lower`
    and `prepare`, which compiles it, take the shapes of both.
    """
    if layout.mode == "pmap":
        return _Mapped(layout, call)
    return _Compiled(
        network_jit(
            call,
            in_shardings=(state_sharding, layout.split(1)),
            out_shardings=(state_sharding, layout.replicated),
            donate_argnums=0,
        )
    )


class _Compiled:
    """A program for arguments of one shape, which does not hold what its compiler needed."""

    def __init__(self, program: jax.stages.Wrapped):
        self.lower = program.lower
        self._compiled: jax.stages.Compiled | None = None

    def prepare(self, *arguments: Any) -> None:
        """Compiles it for arguments of these shapes, which need not be there yet."""
        with uncollected():
            lowered = self.lower(*arguments)
        self._compiled = lowered.compile()
        del lowered
        release_memory()

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            self.prepare(*arguments)
        return self._compiled(*arguments)


class _Mapped:
    """`compile_call` by pmap, to which each host passes what its own devices hold.

    Between the arrays of all hosts that the rest of the code sees and those of one host nothing is
    copied: they are the same buffers under other names.
    """

    def __init__(self, layout: Layout, call: Callable[..., tuple[Any, Any]]):
        self._layout = layout
        self._local = dataclasses.replace(layout, mesh=layout.mesh.local_mesh)
        # images [steps, batch, ...] to [steps, devices, batch / devices, ...], where they lie.
        self._parts = jax.jit(self._dealt, out_shardings=layout.split(1))
        self._call = jax.pmap(
            functools.partial(call, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(None, 1),
            out_axes=None,
            devices=list(layout.mesh.devices.flat),
            donate_argnums=0,
        )

    def _dealt(self, images: jax.Array) -> jax.Array:
        steps, batch, *image = images.shape
        n = self._layout.num_devices
        return images.reshape(steps, n, batch // n, *image)

    def __call__(self, state: Any, images: jax.Array) -> tuple[Any, Any]:
        one, all_ = self._local, self._layout
        if one.mesh == all_.mesh:
            return self._call(state, self._parts(images))
        parts = _renamed(self._parts(images), one.split(1))
        local = jax.tree.map(lambda x: _renamed(x, one.replicated), state)
        return jax.tree.map(lambda x: _renamed(x, all_.replicated), self._call(local, parts))

    def prepare(self, *_: Any) -> None:
        """Nothing: pmap compiles for arrays that are there."""

    def lower(self, state: Any, images: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        # Only such values pass for arrays of all hosts, not of this one.
        shapes = state, jax.eval_shape(self._dealt, images)
        values = jax.tree.map(lambda x: jax.core.ShapedArray(x.shape, x.dtype), shapes)
        return self._call.lower(*values)


def _renamed(x: Any, sharding: NamedSharding) -> Any:
    """An array of the same buffers on this host's devices; what is no array stays as it is."""
    if not isinstance(x, jax.Array):
        return x
    buffers = [shard.data for shard in x.addressable_shards]
    shape = list(x.shape)
    for axis, name in enumerate(sharding.spec):
        if name:
            shape[axis] = sharding.mesh.size * buffers[0].shape[axis]
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, buffers)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python looks for no garbage meanwhile: a fifth of the time that tracing takes else."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def release_memory() -> None:
    """Gives back to the system what tracing and compilers no longer need."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Gives back to the system what was freed, which glibc keeps."""
    with contextlib.suppress(OSError, AttributeError):  # Other systems' libraries do so themselves.
        ctypes.CDLL(None).malloc_trim(0)


def from_host(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every host has whole, laid over the devices of all of them."""
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def first_hosts(values: np.ndarray) -> np.ndarray:
    """The first host's values on every host: what depends on a disk is decided by one of them.

    Args:
      values: of equal shape and dtype on all hosts.
    """
    values = np.asarray(values)
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def wait_for_all(name: str) -> None:
    """Returns when every host has called it, so that what the first one wrote can be read."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def to_host(x: jax.Array) -> np.ndarray:
    """The whole of an array that may be spread over hosts, on every host."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)
