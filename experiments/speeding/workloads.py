"""The work that all contestants do: networks of shipped configs, at the batch of the hardware."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.extend.core import jaxprs_in_params

from ddpm_jax import config as config_lib
from ddpm_jax.runs import image_shape
from ddpm_jax.training.job import Job

# Name → (config, batch on CPUs; on accelerators images a training and a sampling step).
NETWORKS = {
    "digits": ("configs/digits.py", 64, (64, 64)),
    "small": ("configs/cifar10.py:small", 64, (128, 256)),
    "cifar10": ("configs/cifar10.py", 8, (128, 256)),
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network and a batch, in a form that a command line can carry.

    Attributes:
      network: of NETWORKS.
      batch: images a training step.
      samples: images a sampling step; None: as many.
      dtype: of the computation.
      overrides: (dotted key, text) that change the config, for cost curves.
    """

    network: str
    batch: int
    samples: int | None = None
    dtype: str = "float32"
    overrides: tuple[tuple[str, str], ...] = ()

    @property
    def config(self) -> ml_collections.ConfigDict:
        """The config, with this batch and dtype."""
        config = copy.deepcopy(config_lib.load_file(NETWORKS[self.network][0]))
        config.train.batch_size = self.batch
        config.sample.batch_size = config.sample.count = self.samples or self.batch
        config.model.dtype = self.dtype
        for key, value in self.overrides:
            config_lib.override(config, key, value)
        return config

    def to_json(self) -> str:
        """For `from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Workload:
        """Of `to_json`'s text."""
        content = json.loads(text)
        content["overrides"] = tuple(map(tuple, content["overrides"]))
        return cls(**content)

    @classmethod
    def of(cls, network: str, on_accelerator: bool) -> Workload:
        """A network's, for this hardware."""
        _, on_cpus, on_accelerators = NETWORKS[network]
        batch, samples = on_accelerators if on_accelerator else (on_cpus, on_cpus)
        return cls(network, batch, samples)


def network_flops(job: Job) -> int:
    """`matmul_flops` of a pass of a job's batch through its network."""
    batch, model = job.config.train.batch_size, job.task.model
    x = jax.ShapeDtypeStruct((batch, *image_shape(job.config)), jnp.float32)
    t = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return matmul_flops(
        lambda params, x, t: model.apply({"params": params}, x, t), job.abstract.params, x, t
    )


def matmul_flops(function: Any, *arguments: Any) -> int:
    """The floating-point operations of a function's convolutions and matrix products, by hand.

    Two for each product that is summed, padding counted as values; nothing else is counted: the
    useful work of a network, whatever the compiler makes of it. Loops count once.
    """
    return _flops_of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops_of(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        out = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            spec = equation.params["dimension_numbers"].rhs_spec
            total += 2 * out * math.prod(kernel) // kernel[spec[0]]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * out * math.prod(shape[axis] for axis in contracted)
        else:
            # A branch for another platform is not run: that of `default` comes last.
            inner = list(jaxprs_in_params(equation.params))
            chosen = inner[-1:] if equation.primitive.name in ("cond", "platform_index") else inner
            total += sum(_flops_of(one) for one in chosen)
    return total
