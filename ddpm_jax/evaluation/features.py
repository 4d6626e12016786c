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
_EFFNET = "effnetlite0_"
VERSION = 1  # Raised when the same name, weights and images would give other features.

Array = jax.Array | np.ndarray
Apply = Callable[[Any, Array], dict[str, Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A named function from images to features.

    name: as in the metrics' names.
    identity: JSON-able; features of equal identities are interchangeable, others are not.
    params: a pytree for `apply`.
    apply: (params, uint8 [n, h, w, c]) -> {"features": float32 [n, d]}, with "logits" float32
      [n, classes] beside it if `has_logits`; a pure function that can be compiled, unless
      `on_host`.
    has_logits: whether it classifies, as an Inception score needs.
    on_host: whether `apply` takes and returns NumPy arrays, and cannot be compiled.
    """

    name: str
    identity: dict[str, Any]
    params: Any
    apply: Apply
    has_logits: bool = False
    on_host: bool = False

    def num_features(self, image_shape: tuple[int, int, int]) -> int:
        """The d of images of this shape (h, w, c).

        One on the host is called with a black image for it; others are only traced.

        Raises:
          ValueError: it does not take such images.
        """
        if self.on_host:
            black = np.zeros((1, *image_shape), np.uint8)
            return self.apply(self.params, black)["features"].shape[-1]
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
    has_logits: bool = False,
) -> Extractor:
    """An extractor of one's own, e.g. from a network of another library.

    Args:
      name: ASCII letters, digits and underscores, and none of the known names.
      function: images uint8 [n, h, w, c] -> features [n, d], the features of an image depending on
        that image alone. In JAX, unless `on_host`.
      identity: JSON-able; what the features depend on, such as the weights' version. Where features
        of real images are kept in a file, they are found again by the name and this: change it when
        the function changes.
      params: if given, a pytree that `function` then takes as its first argument; large arrays
        that the function held instead would be compiled into the program.
      on_host: the function takes NumPy arrays and is called as it is, never compiled. To learn d,
        it is called with one black image first.
      has_logits: the function classifies too, and returns {"features": [n, d],
        "logits": [n, classes]}; an Inception score needs the logits.
    Raises:
      ValueError: the name is known or no name, or `params` are given to a function on the host.
        Also from `apply`: the function returns something else.
    """
    taken = known(name) or name.startswith(_EFFNET)
    if taken or not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise ValueError(f"name={name}: choose letters, digits and underscores, and not {NAMES}")
    if on_host and params is not None:
        raise ValueError("params are for functions in JAX; one on the host keeps its own")
    apply = functools.partial(_call, function, params is not None, on_host, has_logits)
    whole = {"network": "own", **(identity or {})}
    return Extractor(name, whole, {} if params is None else params, apply, has_logits, on_host)


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


def _call(function, takes_params, on_host, has_logits, params, images):
    found = function(params, images) if takes_params else function(images)
    names = ("features", "logits") if has_logits else ("features",)
    outputs = found if isinstance(found, Mapping) else {"features": found}
    if set(outputs) != set(names):
        raise ValueError(
            f"{' and '.join(names)} are needed (has_logits={has_logits}), and the function gave "
            f"{', '.join(map(str, outputs)) or 'nothing'}"
        )
    as_array = np.asarray if on_host else jnp.asarray
    return {name: _matrix(name, outputs[name], len(images), as_array) for name in names}


def _matrix(name, values, n, as_array):
    try:
        array = as_array(values).astype(np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} [{n}, d] are needed, and the function gave a {type(values).__name__}"
        ) from error
    if array.ndim != 2 or array.shape[0] != n:
        raise ValueError(f"{name} [{n}, d] are needed, and the function gave {list(array.shape)}")
    return array


def _rgb(images):
    """Grey as RGB, for a network."""
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"images in grey or RGB are needed, not {images.shape[-1]} channels")
    return jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _effnet_size(name: str) -> int | None:
    match = re.fullmatch(rf"{_EFFNET}([1-9][0-9]{{1,2}})", name)
    return int(match[1]) if match and 32 <= int(match[1]) <= 512 else None
