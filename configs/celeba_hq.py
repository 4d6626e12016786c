"""CelebA-HQ 256×256 as in the paper: 114 M parameters, 500k steps of 64 images, β̃_t.

    python -m ddpm_jax.main --config=configs/celeba_hq.py --workdir=runs/celeba_hq
    python -m ddpm_jax.main --config=configs/celeba_hq.py:folder --workdir=runs/celeba_hq \
        --config.data.data_dir=path/to/images

The first reads the set that TFDS has prepared; `folder` the 30,000 images from a directory, resized
to 256×256 if they are larger. Either is decoded once, into 5.9 GB of data.cache_dir.
Cost: the paper's 2.2 steps/s on a TPU v3-8 are 63 hours.
Expected: the paper's Fig. 3; it reports no number for this set.
"""

import ml_collections

from ddpm_jax.config import apply_variants, default_config

NAMED = {"folder": {"data.name": "folder"}}


def get_config(variants: str = "") -> ml_collections.ConfigDict:
    """The config: `folder`, predictions, variances and objectives, comma-separated."""
    config = default_config()
    config.data.update(name="celeb_a_hq/256", image_size=256, channels=3, flip=True)
    config.data.cache_bytes = 2**33  # Two cores decode 800 of its PNGs a second.
    config.model.update(channel_multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0)
    config.diffusion.update(variance="fixed_small")
    config.train.update(steps=500_000, batch_size=64, learning_rate=2e-5)
    config.parallel.remat = True
    config.evaluation.update(metrics=("bits_per_dim", "fid"), split=("train",))
    return apply_variants(config, variants, NAMED)
