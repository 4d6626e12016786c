"""Weights from and to Hugging Face diffusers' `UNet2DModel`, as the paper's models are published.

Their network sees t−1 in 0..T−1 where ours is given t in 1..T; the weights are the same.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from ddpm_jax import bounded
from ddpm_jax.models import UNet

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"

# What a UNet2DModel must be to be the paper's network, beside what UNet's own attributes say:
# the value, and the one that diffusers takes where config.json is silent.
_REQUIRED: dict[str, tuple[Any, Any]] = {
    "act_fn": ("silu", "silu"),
    "add_attention": (True, True),
    "attention_head_dim": (None, 8),
    "attn_norm_num_groups": (None, None),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "mid_block_scale_factor": (1, 1),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "norm_eps": (1e-6, 1e-5),
    "num_class_embeds": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "time_embedding_dim": (None, None),
    "time_embedding_type": ("positional", "positional"),
    "upsample_type": ("conv", "conv"),
}
_BLOCKS = {"DownBlock2D": False, "AttnDownBlock2D": True}  # Whether there is attention.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_diffusers(
    config: Mapping[str, Any], state: Mapping[str, np.ndarray]
) -> tuple[UNet, dict[str, Any]]:
    """Our network and its parameters from those of a `UNet2DModel`.

    Args:
      config: its config.json.
      state: its state dict, as arrays; attention may have its names of before diffusers 0.15.
    Returns:
      The network, and its parameters, float32 and equal to theirs to the bit.
    Raises:
      ValueError: it is not a network of the DDPM kind (the key and the value needed are named), or
        arrays are missing, left over, or of another shape.
    """
    model = _model_of(config)
    state = {_current_name(name): np.asarray(array) for name, array in state.items()}
    image = (config["sample_size"], config["sample_size"], config.get("in_channels", 3))
    shapes = _parameter_shapes(model, image)
    names = {path: _their_name(path, model) for path in shapes}
    if missing := sorted(set(names.values()) - set(state)):
        raise ValueError(f"{len(missing)} arrays are missing from the state, first {missing[0]}")
    if extra := sorted(set(state) - set(names.values())):
        raise ValueError(f"{len(extra)} arrays in the state have no place, first {extra[0]}")
    params = {}
    for path, name in names.items():
        array = _to_ours(state[name], shapes[path])
        if array.shape != shapes[path]:
            raise ValueError(f"{name} has shape {state[name].shape}, not that of the config")
        params[path] = jnp.asarray(array, dtype=jnp.float32)
    return model, flax.traverse_util.unflatten_dict(params)


def to_diffusers(model: UNet, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of the `UNet2DModel` with these parameters, equal to the bit."""
    flat = flax.traverse_util.flatten_dict(dict(params))
    return {_their_name(path, model): _to_theirs(path, flat[path]) for path in flat}


def diffusers_config(model: UNet, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The config.json of the `UNet2DModel` that is this network.

    Args:
      image_shape: (height, width, channels) of the images, square.
    """
    size, _, channels = image_shape
    levels = range(len(model.channel_multipliers))
    down = ["AttnDown" * (size >> i in model.attention_resolutions) or "Down" for i in levels]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": size,
        "in_channels": channels,
        "out_channels": model.out_channels,
        "block_out_channels": [model.channels * m for m in model.channel_multipliers],
        "down_block_types": [f"{kind}Block2D" for kind in down],
        "up_block_types": [f"{kind.replace('Down', 'Up')}Block2D" for kind in reversed(down)],
        "layers_per_block": model.num_res_blocks,
        "norm_num_groups": model.norm_groups,
        "dropout": model.dropout,
        **{key: value for key, (value, _) in _REQUIRED.items()},
    }


def load_diffusers(directory: str | pathlib.Path) -> tuple[UNet, dict[str, Any]]:
    """`from_diffusers` of a directory's config.json and safetensors.

    Raises:
      FileNotFoundError: the directory lacks one of them.
      ValueError: one of them is damaged or too large; or see `from_diffusers`.
    """
    directory = pathlib.Path(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}")
    config = bounded.read_json(directory / CONFIG_FILE)
    return from_diffusers(config, bounded.read_tensors(directory / WEIGHTS_FILE)[0])


def save_diffusers(
    directory: str | pathlib.Path,
    model: UNet,
    params: Mapping[str, Any],
    image_shape: tuple[int, int, int],
) -> None:
    """Writes what `UNet2DModel.from_pretrained(directory)` reads."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = json.dumps(diffusers_config(model, image_shape), indent=2)
    (directory / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
    save_file(to_diffusers(model, params), directory / WEIGHTS_FILE)


def _model_of(config: Mapping[str, Any]) -> UNet:
    for key, (needed, default) in _REQUIRED.items():
        if (value := config.get(key, default)) != needed:
            raise ValueError(f"{key}={value!r}: a network of the DDPM kind has {needed!r}")
    size, widths = config.get("sample_size"), config["block_out_channels"]
    down, up = config["down_block_types"], config["up_block_types"]
    if not isinstance(size, int):
        raise ValueError(f"sample_size={size!r}: the side of the square images is needed")
    if unknown := [kind for kind in down if kind not in _BLOCKS]:
        raise ValueError(f"down_block_types has {unknown[0]}: known are {', '.join(_BLOCKS)}")
    if [kind.replace("Up", "Down") for kind in reversed(up)] != list(down):
        raise ValueError(f"up_block_types={up} does not mirror down_block_types={down}")
    if uneven := [width for width in widths if width % widths[0]]:
        raise ValueError(f"block_out_channels has {uneven[0]}, no multiple of {widths[0]}")
    return UNet(
        channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        num_res_blocks=config.get("layers_per_block", 2),
        attention_resolutions=tuple(size >> i for i, kind in enumerate(down) if _BLOCKS[kind]),
        dropout=config.get("dropout", 0.0),
        out_channels=config.get("out_channels", 3),
        norm_groups=config.get("norm_num_groups", 32),
    )


def _parameter_shapes(
    model: UNet, image: tuple[int, int, int]
) -> dict[tuple[str, ...], tuple[int, ...]]:
    x = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(params).items()}


_SINGLE = {
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "norm_out": "conv_norm_out",
    "time_0": "time_embedding.linear_1",
    "time_1": "time_embedding.linear_2",
    "middle_block_0": "mid_block.resnets.0",
    "middle_block_1": "mid_block.resnets.1",
    "middle_attention": "mid_block.attentions.0",
}
_LAYERS = {
    "norm_0": "norm1",
    "conv_0": "conv1",
    "time": "time_emb_proj",
    "norm_1": "norm2",
    "conv_1": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def _their_name(path: tuple[str, ...], model: UNet) -> str:
    """A parameter's name there: ("down_0_block_1", "conv_0", "kernel") is
    down_blocks.0.resnets.1.conv1.weight."""
    module, *layer, leaf = path
    if module in _SINGLE:
        name = _SINGLE[module]
    else:
        way, level, kind, *index = module.split("_")
        if way == "up":
            level = str(len(model.channel_multipliers) - 1 - int(level))
        kinds = {"block": "resnets", "attention": "attentions", "conv": f"{way}samplers.0.conv"}
        name = ".".join([f"{way}_blocks", level, kinds[kind], *index])
    return ".".join([name, *(_LAYERS[part] for part in layer), _LEAVES[leaf]])


def _current_name(name: str) -> str:
    *module, layer, leaf = name.split(".")
    if module and module[-2:-1] == ["attentions"]:
        layer = _OLD_ATTENTION.get(layer, layer)
    return ".".join([*module, layer, leaf])


def _to_ours(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A kernel from (out, in, …) to (…, in, out); 1×1 convolutions are our dense layers."""
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
        return array[0, 0] if len(shape) == 2 and array.shape[:2] == (1, 1) else array
    return array.T


def _to_theirs(path: tuple[str, ...], array: Any) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2:
        array = array.T
        if "shortcut" in path:
            array = array[:, :, None, None]
    return np.ascontiguousarray(array)
