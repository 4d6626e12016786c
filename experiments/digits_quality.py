"""Are the digits digits, of every class, and no copies? A classifier and neighbours answer.

    pip install -e '.[test]'
    python -m ddpm_jax.main --mode=sample --workdir=runs/digits --config.sample.count=1000
    python -m experiments.digits_quality --workdir=runs/digits

Writes evaluation/digits_quality.json and figures/digits_neighbors.png into the run. The classifier
is a perceptron with two hidden layers, trained on the real training digits; the same questions
asked of the real test digits say what the answers would be for perfect samples.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
from etils import epath

from ddpm_jax import config as config_lib
from ddpm_jax import figures, files
from ddpm_jax.data import Source, open_source
from ddpm_jax.evaluation.neighbors import neighbors_of
from ddpm_jax.generation import load_images
from ddpm_jax.runs import RunDirectory

CONFIDENT = 0.9


def quality(images: np.ndarray, train: Source, test: Source) -> dict[str, Any]:
    """What the classifier and the neighbours say of uint8 images [n, 8, 8, 1].

    Returns, for the images and for the real test digits: the share that the classifier gives a
    probability over 0.9, the share of each class, and quantiles of the distance to the nearest
    training digit (RMSE on 0–255).
    """
    from sklearn.neural_network import MLPClassifier

    everything = np.arange(len(train))
    reference, labels = _flat(train.images(everything)), train.labels(everything)
    classifier = MLPClassifier((256, 128), alpha=0.01, max_iter=500, random_state=0)
    classifier.fit(reference / 255, labels)
    held_out = _flat(test.images(np.arange(len(test))))
    result = {}
    for name, flat in (("samples", _flat(images)), ("real test digits", held_out)):
        probabilities = classifier.predict_proba(flat / 255)
        distances = neighbors_of(flat, reference).distances[:, 0]
        classes = np.bincount(probabilities.argmax(axis=1), minlength=10) / len(flat)
        result[name] = {
            "count": len(flat),
            "share_confident": float((probabilities.max(axis=1) > CONFIDENT).mean()),
            "class_shares": classes.round(4).tolist(),
            "neighbor_rmse_quantiles": {
                str(q): float(np.quantile(distances, q)) for q in (0, 0.01, 0.1, 0.5, 0.9)
            },
            "copies": int((distances < 1).sum()),
        }
    return result


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64)


def main() -> None:
    """Reads samples, writes and prints the answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True, help="a run of configs/digits.py")
    parser.add_argument("--samples", help="a file of --mode=sample; the run's newest, unless given")
    args = parser.parse_args()
    directory = RunDirectory.of(args.workdir)
    config = directory.load_config()
    found = sorted(files.matching(directory.samples, "*.npz"), key=files.mtime)
    if args.samples:
        found = [path for path in [epath.Path(args.samples)] if path.is_file()]
    if not found:
        raise config_lib.RequestError(
            f"no samples in {args.samples or directory.samples}: run ddpm_jax.main --mode=sample "
            "first"
        )
    images, protocol = load_images(found[-1])
    train, test = open_source(config, "train"), open_source(config, "test")
    result = {**quality(images, train, test), "protocol": protocol}
    target = directory.path / "evaluation" / "digits_quality.json"
    files.replace(target, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    _picture(directory.figures / "digits_neighbors.png", images[:16], train)


def _picture(path: epath.Path, images: np.ndarray, train: Source) -> None:
    reference = train.images(np.arange(len(train)))
    positions = neighbors_of(_flat(images), _flat(reference)).positions[:, 0]
    pair = np.concatenate([images, reference[positions]])
    figures.save_png(path, figures.grid(pair, columns=len(images)))
    print(f"samples (top) and their nearest training digits (bottom): {path}")


if __name__ == "__main__":
    try:
        main()
    except config_lib.RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
