"""A directory of PNG and JPEG files, cropped to squares of 64×64 unless told otherwise.

    python -m ddpm_jax.main --config=configs/folder.py --workdir=runs/mine \
        --config.data.data_dir=path/to/images --config.data.image_size=128

Cost: at 64×64 about four times that of CIFAR-10 a step (45.7 M parameters).
Expected: depends on the images; some ten thousand are needed for samples that are not copies.
"""

import ml_collections

from ddpm_jax.config import apply_variants, default_config


def get_config(variants: str = "") -> ml_collections.ConfigDict:
    """The config: predictions, variances and objectives, comma-separated."""
    config = default_config()
    config.data.update(name="folder", image_size=64, channels=3, flip=True)
    config.model.update(channel_multipliers=(1, 2, 2, 2, 2))
    return apply_variants(config, variants)
