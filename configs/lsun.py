"""LSUN 256×256 as in the paper: 114 M or, for bedroom_large, 256 M parameters, batch 64, β̃_t.

    python -m ddpm_jax.main --config=configs/lsun.py:church --workdir=runs/church \
        --config.data.data_dir=path/to/lsun
    python -m ddpm_jax.main --config=configs/lsun.py:bedroom_large --workdir=runs/bedroom_large \
        --config.data.data_dir=path/to/lsun

The directory holds unpacked LMDBs (church_outdoor_train_lmdb, bedroom_train_lmdb, cat), which are
read as they are. Sets prepared by TFDS serve as well: --config.data.name=lsun/church_outdoor.
Cost: the paper's 2.2 steps/s on a TPU v3-8 make 1.2M steps of church 6.3 days.
Expected FIDs (the paper's Table 3): church 7.89, bedroom 6.36 (large 4.90), cat 19.75.
"""

import ml_collections

from ddpm_jax.config import apply_variants, default_config

NAMED = {
    "church": {"data.name": "lsun_lmdb/church_outdoor", "train.steps": 1_200_000},
    "cat": {
        "data.name": "lsun_lmdb/cat",
        "train.steps": 1_800_000,
        "evaluation.split": ("train",),  # It has no other.
    },
    "bedroom": {"data.name": "lsun_lmdb/bedroom", "data.flip": False, "train.steps": 2_400_000},
    "bedroom_large": {
        "data.name": "lsun_lmdb/bedroom",
        "data.flip": False,
        "model.channels": 192,
        "train.steps": 1_150_000,
    },
}


def get_config(variants: str = "") -> ml_collections.ConfigDict:
    """The config of a set (church, unless named), with predictions, variances and objectives."""
    config = default_config()
    config.data.update(image_size=256, channels=3, flip=True)
    config.model.update(channel_multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0)
    config.diffusion.update(variance="fixed_small")
    config.train.update(batch_size=64, learning_rate=2e-5)
    config.parallel.remat = True
    # StyleGAN2's code, with which the paper's numbers were made, takes 50,000 real images.
    config.evaluation.update(metrics=("fid",), split=("val",), reference_count=50_000)
    if not NAMED.keys() & set(variants.split(",")):
        variants = f"church,{variants}"
    return apply_variants(config, variants, NAMED)
