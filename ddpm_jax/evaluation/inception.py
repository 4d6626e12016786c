"""The Inception network of FID and the Inception score, with TensorFlow 1's own resize.

This is the frozen graph `inception-2015-12-05`, a variant of Inception-v3 (Szegedy et al. 2015,
arXiv:1512.00567), on which Salimans et al. 2016 (arXiv:1606.03498) and Heusel et al. 2017
(arXiv:1706.08500) defined the scores. Networks of that name in other libraries differ in the
resize, the scaling, the pools' borders, the last block's pool, the classes and the weights, and
so give other scores.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SIZE = 299
NUM_CLASSES = 1008
BATCH_NORM_EPSILON = 1e-3

Layer = tuple[int, tuple[int, int]] | tuple[int, tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Block:
    """A block's parallel branches, whose outputs are concatenated.

    branches: name -> its layers in order; a layer is its width and its kernel, or its width and
      the two kernels of a fork, whose outputs are concatenated.
    pool: the last branch's pool, "average" or "max".
    pool_width: the width of the 1×1 convolution after the pool; 0 for none.
    stride: of the pool and of each branch's last layer, which has no padding if this is 2.
    """

    branches: dict[str, tuple[Layer, ...]]
    pool: str = "average"
    pool_width: int = 0
    stride: int = 1


def _block_35(pool_width: int) -> Block:
    branches = {
        "branch1x1": ((64, (1, 1)),),
        "branch5x5": ((48, (1, 1)), (64, (5, 5))),
        "branch3x3dbl": ((64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
    }
    return Block(branches, pool_width=pool_width)


def _block_17(width: int) -> Block:
    row, column = (width, (1, 7)), (width, (7, 1))
    branches = {
        "branch1x1": ((192, (1, 1)),),
        "branch7x7": ((width, (1, 1)), row, (192, (7, 1))),
        "branch7x7dbl": ((width, (1, 1)), column, row, column, (192, (1, 7))),
    }
    return Block(branches, pool_width=192)


def _block_8(pool: str) -> Block:
    fork = (384, (1, 3), (3, 1))
    branches = {
        "branch1x1": ((320, (1, 1)),),
        "branch3x3": ((384, (1, 1)), fork),
        "branch3x3dbl": ((448, (1, 1)), (384, (3, 3)), fork),
    }
    return Block(branches, pool=pool, pool_width=192)


STEM: dict[str, tuple[int, tuple[int, int], int, str]] = {  # width, kernel, stride, padding
    "Conv2d_1a_3x3": (32, (3, 3), 2, "VALID"),
    "Conv2d_2a_3x3": (32, (3, 3), 1, "VALID"),
    "Conv2d_2b_3x3": (64, (3, 3), 1, "SAME"),
    "Conv2d_3b_1x1": (80, (1, 1), 1, "VALID"),
    "Conv2d_4a_3x3": (192, (3, 3), 1, "VALID"),
}
BLOCKS: dict[str, Block] = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": Block(
        {
            "branch3x3": ((384, (3, 3)),),
            "branch3x3dbl": ((64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
        },
        pool="max",
        stride=2,
    ),
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": Block(
        {
            "branch3x3": ((192, (1, 1)), (320, (3, 3))),
            "branch7x7x3": ((192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3))),
        },
        pool="max",
        stride=2,
    ),
    "Mixed_7b": _block_8("average"),
    "Mixed_7c": _block_8("max"),  # In this network alone; others average here too.
}
# The feature points that are means over a map, by the layer or pool that they follow.
_POINTS = {"Conv2d_2b_3x3": "64", "Conv2d_4a_3x3": "192", "Mixed_6e": "768", "Mixed_7c": "2048"}


def tf1_resize(images: jax.Array, size: int = SIZE) -> jax.Array:
    """TensorFlow 1's `resize_bilinear`: pixel i is read at i · (old size / new size).

    There are no half-pixel centres and there is no antialiasing, unlike in any current library.

    Args:
      images: [n, h, w, c].
    Returns:
      float32 [n, size, size, c].
    """
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        old = x.shape[axis]
        position = np.arange(size, dtype=np.float32) * np.float32(old / size)
        low = position.astype(np.int32)
        shape = [-1 if other == axis else 1 for other in range(4)]
        weight = (position - low.astype(np.float32)).reshape(shape)
        left = jnp.take(x, low, axis)
        x = left + (jnp.take(x, np.minimum(low + 1, old - 1), axis) - left) * weight
    return x


class ConvNorm(nn.Module):
    """A convolution without bias, then batch normalization by stored statistics.

    The products are float32, whose factors accelerators would round by default.
    """

    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel, x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        x = lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )
        return batch_norm(self, x)


def batch_norm(module: nn.Module, x: jax.Array) -> jax.Array:
    """Batch normalization by stored statistics, whose four parameters join the module's."""
    shape, ones, zeros = x.shape[-1:], nn.initializers.ones, nn.initializers.zeros
    scale, bias = module.param("scale", ones, shape), module.param("bias", zeros, shape)
    mean, var = module.param("mean", zeros, shape), module.param("var", ones, shape)
    return (x - mean) * (scale * lax.rsqrt(var + BATCH_NORM_EPSILON)) + bias


class InceptionBlock(nn.Module):
    """One block of the table BLOCKS."""

    block: Block

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stride = self.block.stride
        outputs = []
        for branch, layers in self.block.branches.items():
            y = x
            for i, (width, *kernels) in enumerate(layers):
                last = i == len(layers) - 1
                stride_here = stride if last else 1
                padding = "VALID" if stride_here > 1 else "SAME"
                names = layer_names(branch, layers, i)
                forks = [
                    nn.relu(ConvNorm(width, kernel, stride_here, padding, name=name)(y))
                    for name, kernel in zip(names, kernels, strict=True)
                ]
                y = jnp.concatenate(forks, axis=-1) if len(forks) > 1 else forks[0]
            outputs.append(y)
        padding = "VALID" if stride > 1 else "SAME"
        if self.block.pool == "max":
            pooled = nn.max_pool(x, (3, 3), (stride, stride), padding)
        else:  # At the borders, the mean of the pixels that are there.
            pooled = nn.avg_pool(x, (3, 3), (stride, stride), padding, count_include_pad=False)
        if self.block.pool_width:
            pooled = nn.relu(ConvNorm(self.block.pool_width, name="branch_pool")(pooled))
        return jnp.concatenate([*outputs, pooled], axis=-1)


def layer_names(branch: str, layers: tuple[Layer, ...], index: int) -> list[str]:
    """The names of a branch's layer, two for a fork, as in the known PyTorch versions."""
    name = f"{branch}_{index + 1}" if len(layers) > 1 else branch
    return [name] if len(layers[index]) == 2 else [f"{name}a", f"{name}b"]


class Inception(nn.Module):
    """The network. All of its parameters, statistics included, are in the collection `params`.

    with_logits: whether it ends in the 1008 classes.
    """

    with_logits: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Features at every point where they are used.

        Args:
          images: uint8 or float32 in 0..255, [n, h, w, 3], of any size; resized to 299 × 299.
        Returns:
          float32: "64", "192", "768" and "2048", means over a map, [n, that many]; and if
          `with_logits`, "logits_unbiased" and "logits" [n, 1008], without and with the bias. FID
          takes "2048"; the Inception score's original code "logits_unbiased".
        Raises:
          ValueError: the images have not 3 channels.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images [n, h, w, 3] are needed, not {list(images.shape)}")
        features = {}
        x = (tf1_resize(images) - 128) / 128
        for name, (width, kernel, stride, padding) in STEM.items():
            x = nn.relu(ConvNorm(width, kernel, stride, padding, name=name)(x))
            if name in _POINTS:
                x = nn.max_pool(x, (3, 3), (2, 2), "VALID")
                features[_POINTS[name]] = x.mean((1, 2))
        for name, block in BLOCKS.items():
            x = InceptionBlock(block, name=name)(x)
            if name in _POINTS:
                features[_POINTS[name]] = x.mean((1, 2))
        if self.with_logits:
            features.update(Classes(NUM_CLASSES, name="fc")(features["2048"]))
        return features


class Classes(nn.Module):
    """The classes' logits, without and with the bias."""

    count: int

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.count))
        bias = self.param("bias", nn.initializers.zeros, (self.count,))
        unbiased = jnp.dot(x, kernel, precision=lax.Precision.HIGHEST)
        return {"logits_unbiased": unbiased, "logits": unbiased + bias}


@functools.cache
def parameter_shapes(with_logits: bool = True) -> dict[str, tuple[int, ...]]:
    """ "module/…/leaf" -> shape of all the network's parameters."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
    variables = jax.eval_shape(Inception(with_logits).init, jax.random.key(0), image)
    flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}


def check_shapes(params: Mapping[str, np.ndarray], with_logits: bool = True) -> None:
    """Raises a ValueError that names the first of the arrays that does not fit the network.

    Args:
      params: "module/…/leaf" -> array.
    """
    expected = parameter_shapes(with_logits)
    for name in sorted(expected.keys() | params.keys()):
        if name not in expected or name not in params:
            raise ValueError(f"{name} is {'missing' if name in expected else 'not of the network'}")
        array, shape = params[name], expected[name]
        if array.shape != shape or array.dtype != np.float32:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, not float32 {shape}")


# From the names in each file of weights to ours.

BATCH_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def from_torch_state(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters from those of pytorch-fid's and torch-fidelity's network."""
    params = {}
    for name, array in state.items():
        *module, layer, leaf = name.split(".")
        if leaf == "num_batches_tracked":
            continue
        if layer == "conv" and leaf == "weight":
            leaf, array = "kernel", array.transpose(2, 3, 1, 0)
        elif layer == "bn":
            leaf = BATCH_NORM.get(leaf, leaf)
        else:  # The classes.
            module = [*module, layer]
            if leaf == "weight":
                leaf, array = "kernel", array.T
        params["/".join([*module, leaf])] = np.ascontiguousarray(array)
    return params


def tf_names() -> dict[str, str]:
    """The frozen graph's name -> ours, of each layer."""
    modules = {}
    for i, name in enumerate(STEM):
        modules[_numbered("conv", i)] = name
    for i, (block_name, block) in enumerate(BLOCKS.items()):
        scope, towers = _numbered("mixed", i), 0
        for branch, layers in block.branches.items():
            tower = ""
            if len(layers) > 1:
                tower, towers = _numbered("tower", towers) + "/", towers + 1
            for j in range(len(layers)):
                names = layer_names(branch, layers, j)
                theirs = [_numbered("conv", j)]
                if len(names) > 1:
                    theirs = [f"mixed/{_numbered('conv', k)}" for k in range(len(names))]
                for their, our in zip(theirs, names, strict=True):
                    modules[f"{scope}/{tower}{their}"] = f"{block_name}/{our}"
        if block.pool_width:
            modules[f"{scope}/{_numbered('tower', towers)}/conv"] = f"{block_name}/branch_pool"
    return modules


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def from_tf_constants(constants: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters from the constants of the frozen graph."""
    leaves = {
        "conv2d_params": "kernel",
        "batchnorm/gamma": "scale",
        "batchnorm/beta": "bias",
        "batchnorm/moving_mean": "mean",
        "batchnorm/moving_variance": "var",
    }
    names = {f"{t}/{leaf}": f"{o}/{leaves[leaf]}" for t, o in tf_names().items() for leaf in leaves}
    names |= {"softmax/weights": "fc/kernel", "softmax/biases": "fc/bias"}
    return {ours: constants[theirs] for theirs, ours in names.items() if theirs in constants}


def from_jax_fid(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters from jax-fid's nested dicts, without the classes (theirs are others)."""
    flat = flax.traverse_util.flatten_dict(dict(tree))
    return {
        "/".join(part for part in path if part not in ("conv", "bn")): np.asarray(array)
        for path, array in flat.items()
        if path[0] not in ("fc", "AuxLogits")
    }
