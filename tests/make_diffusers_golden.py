"""Makes golden/diffusers_unet.npz: what diffusers' UNet2DModel computes from seeded weights.

pip install -e '.[parity]' && python tests/make_diffusers_golden.py
"""

import pathlib

import diffusers
import numpy as np
import torch
from diffusers import UNet2DModel

CONFIG = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 16,
}
FILE = pathlib.Path(__file__).parent / "golden" / "diffusers_unet.npz"


def seeded_state(shapes):
    """Weights from a seed, by name: large enough that every path of the network shows."""
    rng = np.random.default_rng(20)
    state = {}
    for name in sorted(shapes):
        fan_in = np.prod(shapes[name][1:]) if len(shapes[name]) > 1 else 4
        state[name] = (rng.normal(size=shapes[name]) / np.sqrt(fan_in)).astype(np.float32)
    return state


def inputs():
    """x_t [4, 16, 16, 3] and t in 1..1000."""
    x = np.random.default_rng(21).normal(size=(4, 16, 16, 3)).astype(np.float32)
    return x, np.array([1, 10, 500, 1000])


def run(model, x, t):
    """The output of their model, NHWC, for the paper's t."""
    with torch.no_grad():
        out = model.eval()(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t - 1)).sample
    return out.numpy().transpose(0, 2, 3, 1)


def main():
    """Writes the file."""
    model = UNet2DModel(**CONFIG)
    shapes = {name: tuple(array.shape) for name, array in model.state_dict().items()}
    state = {name: torch.tensor(array) for name, array in seeded_state(shapes).items()}
    model.load_state_dict(state)
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        FILE,
        output=run(model, *inputs()),
        names=sorted(shapes),
        shapes=[",".join(map(str, shapes[name])) for name in sorted(shapes)],
        versions=f"diffusers {diffusers.__version__}, torch {torch.__version__}",
    )


if __name__ == "__main__":
    main()
