"""What an evaluation will take, measured before it starts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.parallel import Layout
from ddpm_jax.progress import duration

LONG_FLOPS = 1e13  # Minutes on a CPU core: below it, measuring would only delay.


def announce(
    what: str,
    layout: Layout,
    apply: Callable[[Any, jax.Array, jax.Array], jax.Array],
    params: Any,
    shape: tuple[int, ...],
    evaluations: int,
    say: Callable[[str], None],
) -> None:
    """Says how long `evaluations` of the network on a batch will take, where that is long.

    Args:
      what: e.g. "10,000 images × 1,000 terms".
      apply: the network: (params, x_t, t) -> output.
      shape: of a batch, over all devices.
    """
    one = layout.split(0)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=one)
    t = jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=one)
    lowered = jax.jit(apply, out_shardings=one).lower(params, x, t)
    flops = (lowered.cost_analysis() or {}).get("flops", LONG_FLOPS)
    if flops * evaluations < LONG_FLOPS:
        return
    network = lowered.compile()
    arguments = params, jnp.zeros(shape, device=one), jnp.ones(shape[:1], jnp.int32, device=one)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(network(*arguments))
        seconds.append(time.perf_counter() - start)
    each = statistics.median(seconds[1:])
    devices = f"{layout.num_devices} {jax.devices()[0].device_kind}"
    say(
        f"{what}: about {duration(each * evaluations)} on {devices} ({each:.3g} s for the network "
        f"on {shape[0]} images, {evaluations:,} times)"
    )
