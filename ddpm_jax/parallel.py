"""Devices: the mesh, how state and batches lie on it, and the compilation of one step over it.

`jit` replicates the parameters and splits the batch; `fsdp` splits parameters, average and
optimizer state as well; `pmap` runs the same step as one program a device. The numbers are the
same to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


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


def make_layout(mode: str) -> Layout:
    """The layout over all devices.

    Raises:
      ValueError: pmap over several hosts, which jit does better.
    """
    if mode == "pmap" and jax.process_count() > 1:
        raise ValueError("parallel.mode=pmap runs on one host; use jit or fsdp on several")
    return Layout(mode, Mesh(np.asarray(jax.devices()), (AXIS,), axis_types=(AxisType.Auto,)))


def compile_call(
    layout: Layout, call: Callable[..., tuple[Any, Any]], state_sharding: Any
) -> Callable[[Any, jax.Array], tuple[Any, Any]]:
    """`call(state, images, axis_name=…) -> (state, metrics)`, compiled over the devices.

    The result takes the state in `state_sharding` (donated) and images [steps, batch, ...] in
    `layout.split(1)`, and returns the new state and replicated metrics.
    """
    if layout.mode != "pmap":
        return jax.jit(
            call,
            in_shardings=(state_sharding, layout.split(1)),
            out_shardings=(state_sharding, layout.replicated),
            donate_argnums=0,
        )
    per_device = jax.pmap(
        lambda state, images: call(state, images, axis_name=AXIS),
        axis_name=AXIS,
        in_axes=(None, 1),
        out_axes=None,
        devices=list(layout.mesh.devices.flat),
    )

    def mapped(state: Any, images: jax.Array) -> tuple[Any, Any]:
        steps, batch, *image = images.shape
        parts = images.reshape(steps, layout.num_devices, batch // layout.num_devices, *image)
        return jax.device_put(per_device(state, parts), (state_sharding, layout.replicated))

    return mapped


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
