"""Feature extractors by name: what sample-quality metrics see of an image.

`inception` is the network of FID and IS, `effnetlite0_<size>` EfficientNet-Lite0 on images resized
to that size, `pixels` the pixels themselves. A function of one's own becomes an extractor with
`from_function`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import efficientnet, inception
from ddpm_jax.evaluation.weights import load_inception

NAMES = "inception, effnetlite0_<size> with a size in 32..512, pixels"
CACHE_DIR = "~/.cache/ddpm_jax/evaluation"
VERSION = 1  # Raised when the same name, weights and images would give other features.

Apply = Callable[[Any, jax.Array], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A named function from images to features.

    name: as in the metrics' names.
    identity: JSON-able; features of equal identities are interchangeable, others are not.
    params: a pytree for `apply`.
    apply: (params, uint8 [n, h, w, c]) -> {"features": float32 [n, d]}, with "logits" float32
      [n, classes] beside it if `has_logits`; a pure function that can be compiled.
    has_logits: whether it classifies, as an Inception score needs.
    """

    name: str
    identity: dict[str, Any]
    params: Any
    apply: Apply
    has_logits: bool = False

    def num_features(self, image_shape: tuple[int, int, int]) -> int:
        """The d of images of this shape (h, w, c).

        Raises:
          ValueError: it does not take such images.
        """
        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
        return jax.eval_shape(self.apply, self.params, images)["features"].shape[-1]


def known(name: str) -> bool:
    """Whether `make_extractor` knows the name."""
    return name in ("inception", "pixels") or _effnet_size(name) is not None


def make_extractor(name: str, weights: str = "", cache_dir: str = CACHE_DIR) -> Extractor:
    """The extractor of this name.

    Args:
      name: inception, effnetlite0_<size> with a size in 32..512, or pixels.
      weights: the file or folder of the Inception network's weights, see `weights.load_inception`.
      cache_dir: where their converted file is kept.
    Raises:
      RequestError: no such extractor, or its weights are not there.
    """
    if name == "inception":
        return _inception(weights, cache_dir)
    if name == "pixels":
        return Extractor(name, {"network": "none", "version": VERSION}, {}, _pixels)
    size = _effnet_size(name)
    if size is None:
        raise RequestError(f"config.evaluation.metrics: no features are called {name}: {NAMES}")
    loaded = efficientnet.load_efficientnet()
    identity = {
        "network": "efficientnet-lite0",
        "weights_file": loaded.file_name,
        "weights_sha256": loaded.sha256,
        "input": f"bilinear, antialiased, to {size}",
        "version": VERSION,
    }
    apply = functools.partial(_effnet, efficientnet.EfficientNetLite0(size))
    return Extractor(name, identity, loaded.params, apply, has_logits=True)


def from_function(
    name: str,
    function: Callable[..., Any],
    identity: Mapping[str, Any] | None = None,
    params: Any = None,
    on_host: bool = False,
) -> Extractor:
    """An extractor of one's own, e.g. from a network of another library.

    Args:
      name: letters, digits and underscores, and none of the known names.
      function: images uint8 [n, h, w, c] -> features [n, d], the features of an image depending on
        that image alone. In JAX, unless `on_host`.
      identity: JSON-able; what the features depend on, such as the weights' version. Features are
        kept under the name and this: change it when the function changes.
      params: if given, a pytree that `function` then takes as its first argument; large arrays
        that the function held instead would be compiled into the program.
      on_host: the function takes and returns NumPy arrays. To learn d, it is called with one black
        image first.
    Raises:
      ValueError: the name is known or no name, or `params` are given to a function on the host.
    """
    if known(name) or not re.fullmatch(r"\w+", name):
        raise ValueError(f"name={name}: choose letters, digits and underscores, and not {NAMES}")
    if on_host and params is not None:
        raise ValueError("params are for functions in JAX; one on the host keeps its own")
    if params is None:
        apply = functools.partial(_call_on_host if on_host else _call, function)
    else:
        apply = functools.partial(_call_with_params, function)
    whole = {"network": "own", **(identity or {})}
    return Extractor(name, whole, {} if params is None else params, apply)


def _inception(weights: str, cache_dir: str) -> Extractor:
    loaded = load_inception(weights, cache_dir)
    identity = {
        "network": "inception-2015-12-05",
        "weights_file": loaded.file_name,
        "weights_sha256": loaded.sha256,
        "input": f"TensorFlow 1 bilinear to {inception.SIZE}",
        "version": VERSION,
    }
    network = inception.Inception(with_logits=loaded.has_logits)
    apply = functools.partial(_inception_features, network)
    return Extractor("inception", identity, loaded.params, apply, loaded.has_logits)


def _inception_features(network, params, images):
    features = network.apply({"params": params}, _rgb(images))
    # The logits of the paper's Inception score: OpenAI's code leaves out the bias.
    logits = {"logits": features["logits_unbiased"]} if network.with_logits else {}
    return {"features": features["2048"], **logits}


def _effnet(network, params, images):
    return network.apply({"params": params}, _rgb(images))


def _pixels(params, images):
    x = images.astype(jnp.float32) / 127.5 - 1
    return {"features": x.reshape(x.shape[0], -1)}


def _call(function, params, images):
    return _features(function(images), images)


def _call_with_params(function, params, images):
    return _features(function(params, images), images)


def _call_on_host(function, params, images):
    def call(images):
        return np.asarray(_features(function(np.asarray(images)), images)["features"])

    black = np.zeros((1, *images.shape[1:]), np.uint8)
    shape = (images.shape[0], call(black).shape[1])
    return {"features": jax.pure_callback(call, jax.ShapeDtypeStruct(shape, np.float32), images)}


def _features(features, images):
    if features.ndim != 2 or features.shape[0] != images.shape[0]:
        raise ValueError(
            f"features [{images.shape[0]}, d] are needed, and the function gave "
            f"{list(features.shape)}"
        )
    return {"features": features.astype(np.float32)}


def _rgb(images):
    """Grey as RGB, for a network."""
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"images in grey or RGB are needed, not {images.shape[-1]} channels")
    return jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _effnet_size(name: str) -> int | None:
    match = re.fullmatch(r"effnetlite0_([1-9]\d{1,2})", name)
    return int(match[1]) if match and 32 <= int(match[1]) <= 512 else None
