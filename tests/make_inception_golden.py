"""Makes golden/inception.npz: what torch-fidelity's Inception computes from seeded weights.

pip install torch && pip install --no-deps torch-fidelity && python tests/make_inception_golden.py
"""

import pathlib
import sys
import types
from unittest import mock

import numpy as np

FILE = pathlib.Path(__file__).parent / "golden" / "inception.npz"
POINTS = ("64", "192", "768", "2048", "logits_unbiased", "logits")


def seeded_state(shapes):
    """Weights from a seed, by name, such that features keep their size over all layers."""
    rng = np.random.default_rng(30)
    state = {}
    for name in sorted(shapes):
        shape = shapes[name]
        if len(shape) == 4:
            array = rng.standard_normal(shape, np.float32) * np.sqrt(2 / np.prod(shape[1:]))
        elif len(shape) == 2:
            array = rng.standard_normal(shape, np.float32) / np.sqrt(shape[1])
        elif name.endswith((".weight", ".running_var")):
            array = rng.uniform(0.5, 1.5, shape)
        else:
            array = rng.normal(0, 0.2, shape)
        state[name] = array.astype(np.float32)
    return state


def inputs():
    """uint8 images of two sizes: [2, 32, 32, 3] and [1, 41, 310, 3]."""
    rng = np.random.default_rng(31)
    small = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    small[1] = np.linspace(0, 255, 32)[:, None, None] * [1, 0.5, 0.25]
    return small, rng.integers(0, 256, (1, 41, 310, 3), dtype=np.uint8)


def import_torch_fidelity():
    """torch_fidelity's two modules; they import torchvision, and need none of it."""
    names = ["", ".transforms", ".transforms.functional", ".datasets", ".models"]
    modules = {f"torchvision{name}": types.ModuleType(f"torchvision{name}") for name in names}
    for name in ("CIFAR10", "STL10", "CIFAR100"):
        setattr(modules["torchvision.datasets"], name, object)
    for name in ("transforms", "datasets", "models"):
        setattr(modules["torchvision"], name, modules[f"torchvision.{name}"])
    modules["torchvision.transforms"].functional = modules["torchvision.transforms.functional"]
    with mock.patch.dict(sys.modules, modules):
        from torch_fidelity import feature_extractor_inceptionv3, interpolate_compat_tensorflow
    return feature_extractor_inceptionv3, interpolate_compat_tensorflow


def their_network():
    """torch-fidelity's network, with weights yet to be loaded."""
    import torch

    module, _ = import_torch_fidelity()
    nothing = mock.patch.object(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
    with nothing, mock.patch.object(torch, "load", lambda *args, **kwargs: {}):
        return module.FeatureExtractorInceptionV3("inception", list(POINTS), "unread.pth")


def load(network, state):
    """Gives the network these weights."""
    import torch

    network.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)


def shapes_of(network):
    """Name -> shape of all weights."""
    return {
        name: tuple(array.shape)
        for name, array in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def run(network, images):
    """Feature point -> float32 [n, d]."""
    import torch

    with torch.no_grad():
        outputs = network(torch.tensor(images.transpose(0, 3, 1, 2)))
    return {name: array.numpy() for name, array in zip(POINTS, outputs, strict=True)}


def main():
    """Writes the file."""
    import torch

    network = their_network()
    shapes = shapes_of(network)
    load(network, seeded_state(shapes))
    outputs = [run(network, images) for images in inputs()]
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        FILE,
        names=sorted(shapes),
        shapes=[",".join(map(str, shapes[name])) for name in sorted(shapes)],
        versions=f"torch-fidelity 0.4.0, torch {torch.__version__}",
        **{f"{name}_{i}": output[name] for i, output in enumerate(outputs) for name in POINTS},
    )


if __name__ == "__main__":
    main()
