"""This codebase as a contestant: the very programs that training and sampling run.

python -m experiments.speeding.ours WORKLOAD
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import bounded, interop, keys, losses
from ddpm_jax.data import to_float
from ddpm_jax.generation import compile_sampler
from ddpm_jax.main import use_compilation_cache
from ddpm_jax.models import rounded_kernels
from ddpm_jax.parallel import compile_call, network_jit
from ddpm_jax.runs import image_shape
from ddpm_jax.training.check import step_flops
from ddpm_jax.training.job import make_job
from ddpm_jax.training.step import seeded_call
from experiments.speeding.server import peak_bytes, serve
from experiments.speeding.workloads import Workload, network_flops


class Ours:
    """The programs of a workload, compiled when they are first asked for."""

    def __init__(self, workload: Workload):
        use_compilation_cache()
        self.config = workload.config
        self.job = make_job(self.config)
        shape = self.job.images
        images = np.random.default_rng(0).integers(0, 256, shape.shape, np.uint8)
        self._images = jax.device_put(images, shape.sharding)
        self._state = None
        self._samplers: dict[int, Any] = {}
        self._samples = self.config.sample.batch_size

    @functools.cached_property
    def _program(self) -> Any:
        seeded = self.job.layout.replicated, self.job.sharding
        call = functools.partial(seeded_call, self.job.task)
        program = compile_call(self.job.layout, call, seeded)
        program.prepare((np.int32(0), self.job.abstract), self.job.images)
        return program

    def _started(self) -> Any:
        if self._state is None:
            self._state = self.job.start()
        return self._state

    def describe(self) -> dict[str, Any]:
        """What is run, and on what."""
        device = jax.devices()[0]
        leaves = jax.tree.leaves(self.job.abstract.params)
        return {
            "parameters": sum(leaf.size for leaf in leaves),
            "versions": {
                name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")
            },
            "devices": f"{jax.device_count()} × {device.device_kind}",
            "platform": device.platform,
        }

    def flops(self) -> dict[str, float]:
        """Of a training and a sampling step: by hand, and as XLA counts."""
        once = network_flops(self.job)
        sample = once * self._samples // self.config.train.batch_size
        return {"train": 3 * once, "sample": sample, "train_xla": step_flops(self.job)}

    def write_weights(self, directory: str) -> None:
        """Random weights in diffusers' form, none of them zero."""
        params = self._started().params
        leaves, tree = jax.tree.flatten(params)
        noise = np.random.default_rng(1)
        moved = [x + 0.03 * noise.standard_normal(x.shape).astype(np.float32) for x in leaves]
        params = jax.tree.unflatten(tree, moved)
        interop.save_diffusers(directory, self.job.task.model, params, image_shape(self.config))

    def loss(self, directory: str) -> float:
        """L_simple without dropout, at these weights, of the images, t and noise of inputs.npz."""
        _, params = interop.load_diffusers(directory)
        inputs = bounded.read_arrays(f"{directory}/inputs.npz")
        model = self.job.task.model
        network = network_jit(lambda p, x, t: model.apply({"params": p}, x, t))
        process = self.job.task.process
        denoise = functools.partial(network, params)
        x0 = to_float(inputs["images"])
        args = x0, inputs["t"], jnp.asarray(inputs["noise"]), "simple"
        return float(losses.training_loss(process, denoise, *args).mean())

    def train(self, steps: int) -> float:
        """Seconds a training step, over at least so many."""
        per_call = self.config.train.steps_per_call
        calls = -(-steps // per_call)
        program, state = self._program, self._started()
        start = time.perf_counter()
        for _ in range(calls):
            (_, state), metrics = program((np.int32(0), state), self._images)
        jax.block_until_ready(metrics)
        self._state = state
        return (time.perf_counter() - start) / (calls * per_call)

    def sample(self, steps: int) -> float:
        """Seconds a step of a chain of so many, ancestral."""
        if steps not in self._samplers:
            config = self.config.copy_and_resolve_references()
            config.sample.steps = steps
            task, params = self.job.task, self._started().params
            shardings = jax.tree.map(lambda x: x.sharding, params)
            sampler = compile_sampler(self.job.layout, task.process, task.model, config, shardings)
            self._samplers[steps] = sampler
        start = time.perf_counter()
        drawn = self._samplers[steps](self._started().params, jnp.arange(self._samples))
        jax.block_until_ready(drawn)
        return (time.perf_counter() - start) / steps

    def evaluate(self, steps: int) -> float:
        """Seconds a pass of the network alone, over so many in one loop of a program."""
        model, shape = self.job.task.model, image_shape(self.config)
        if not hasattr(self, "_passes"):

            def passes(params: Any, x: jax.Array, times: jax.Array) -> jax.Array:
                params = rounded_kernels(model.dtype, params)

                def body(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
                    out = model.apply({"params": params}, x, jnp.full(x.shape[:1], t))
                    return out[..., : x.shape[-1]], None

                return jax.lax.scan(body, x, times)[0]

            self._passes = network_jit(passes)
        x = keys.normal(keys.example_keys(0, "sample", 0, jnp.arange(self._samples)), 0, shape)
        times = jnp.arange(steps, 0, -1)
        start = time.perf_counter()
        jax.block_until_ready(self._passes(self._started().params, x, times))
        return (time.perf_counter() - start) / steps

    def memory(self) -> int:
        """The largest number of bytes held: on an accelerator its own, else the process's."""
        found = jax.devices()[0].memory_stats()
        return found["peak_bytes_in_use"] if found else peak_bytes()

    def matrix(self, n: int, products: int) -> float:
        """FLOP/s of so many products of n × n matrices, one after another: the best of ten."""
        # Not ones: accelerators multiply what needs less power faster.
        a = jax.random.normal(jax.random.key(0), (n, n), self.config.model.dtype)
        dot = jax.jit(jnp.dot)
        seconds = []
        for _ in range(11):
            start = time.perf_counter()
            jax.block_until_ready([dot(a, a) for _ in range(products)])
            seconds.append(time.perf_counter() - start)
        return 2 * n**3 * products / min(seconds[1:])


def main() -> None:
    """Serves the workload of the command line."""
    ours = Ours(Workload.from_json(sys.argv[1]))
    public = [name for name in vars(Ours) if not name.startswith("_")]
    serve({name: getattr(ours, name) for name in public})


if __name__ == "__main__":
    main()
