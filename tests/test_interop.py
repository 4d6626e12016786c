"""Weights from and to diffusers, against what diffusers itself computes with them."""

import importlib.util
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import interop
from ddpm_jax.models import UNet

HERE = pathlib.Path(__file__).parent
CONFIG = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": [32, 32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 16,
}


@pytest.fixture(scope="module")
def golden():
    return np.load(HERE / "golden" / "diffusers_unet.npz")


@pytest.fixture(scope="module")
def state(golden):
    """As tests/make_diffusers_golden.py seeds it."""
    rng = np.random.default_rng(20)
    arrays = {}
    for name, text in zip(golden["names"], golden["shapes"], strict=True):
        shape = tuple(map(int, text.split(",")))
        fan_in = np.prod(shape[1:]) if len(shape) > 1 else 4
        arrays[str(name)] = (rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)
    return arrays


def test_outputs_equal_diffusers_stored_ones(golden, state):
    model, params = interop.from_diffusers(CONFIG, state)
    x = np.random.default_rng(21).normal(size=(4, 16, 16, 3)).astype(np.float32)
    out = model.apply({"params": params}, jnp.asarray(x), jnp.array([1, 10, 500, 1000]))
    assert np.abs(golden["output"]).max() > 0.5
    np.testing.assert_allclose(out, golden["output"], atol=1e-4)


@pytest.mark.slow
def test_outputs_equal_diffusers_live(tmp_path):
    pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("golden", HERE / "make_diffusers_golden.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    torch.manual_seed(0)
    theirs = script.UNet2DModel(**script.CONFIG)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = interop.load_diffusers(tmp_path / "theirs")
    x, t = script.inputs()
    out = model.apply({"params": params}, jnp.asarray(x), jnp.asarray(t))
    np.testing.assert_allclose(out, script.run(theirs, x, t), atol=1e-4)
    interop.save_diffusers(tmp_path / "ours", model, params, (16, 16, 3))
    again = script.UNet2DModel.from_pretrained(tmp_path / "ours")
    for name, array in theirs.state_dict().items():
        assert torch.equal(array, again.state_dict()[name]), name


def test_round_trip_is_equal_to_the_bit(state, tmp_path):
    model, params = interop.from_diffusers(CONFIG, state)
    back = interop.to_diffusers(model, params)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)
    interop.save_diffusers(tmp_path, model, params, (16, 16, 3))
    loaded, loaded_params = interop.load_diffusers(tmp_path)
    assert loaded == model
    np.testing.assert_array_equal(
        loaded_params["middle_attention"]["q"]["kernel"], params["middle_attention"]["q"]["kernel"]
    )


def test_old_names_of_attention_are_read(state):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, array in state.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = array
    assert renamed.keys() != state.keys()
    _, params = interop.from_diffusers(CONFIG, renamed)
    _, expected = interop.from_diffusers(CONFIG, state)
    np.testing.assert_array_equal(
        params["up_1_attention_2"]["out"]["kernel"], expected["up_1_attention_2"]["out"]["kernel"]
    )


def test_published_configurations_are_the_papers_networks():
    cifar = {
        **CONFIG,
        "sample_size": 32,
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 32,
        "out_channels": 3,
    }
    assert interop._model_of(cifar) == UNet()
    described = interop.diffusers_config(UNet(), (32, 32, 3))
    assert {key: described[key] for key in cifar} == cifar


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_head_dim": 8}, "attention_head_dim=8"),
        ({"flip_sin_to_cos": True}, "flip_sin_to_cos=True"),
        ({"norm_eps": 1e-5}, "norm_eps=1e-05"),
        ({"sample_size": None}, "sample_size=None"),
        ({"down_block_types": ["SkipDownBlock2D"] * 3}, "SkipDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "does not mirror"),
        ({"block_out_channels": [32, 48, 64]}, "no multiple of 32"),
        ({"out_channels": 3}, "not that of the config"),
        ({"layers_per_block": 3}, "are missing"),
        ({"layers_per_block": 1}, "have no place"),
    ],
)
def test_other_networks_are_refused_with_the_reason(state, change, message):
    with pytest.raises(ValueError, match=message):
        interop.from_diffusers({**CONFIG, **change}, state)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        interop.load_diffusers(tmp_path)
