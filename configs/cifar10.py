"""CIFAR-10 as in the paper (appendix B): 35.7 M parameters, 800k steps of 128 images.

    python -m ddpm_jax.main --config=configs/cifar10.py --workdir=runs/cifar10
    python -m ddpm_jax.main --config=configs/cifar10.py:mu,vlb,learned --workdir=runs/mu_vlb_learned

Cost: 3.8e18 FLOPs; the paper's 21 steps/s on a TPU v3-8 are 10.6 hours.
Expected (the paper's Table 1, ε with L_simple): IS 9.46, FID 3.17, at most 3.75 bits/dim on test.
`small` is a network of 2.2 M parameters for which two CPU cores suffice.
"""

import ml_collections

from ddpm_jax.config import apply_variants, default_config

NAMED = {
    "small": {
        "model.channels": 32,
        "train.batch_size": 32,
        "train.learning_rate": 1e-3,
        "train.warmup_steps": 100,
        "train.ema_decay": 0.999,
        "train.ema_ramp": True,
        "train.steps": 2000,
        "train.log_every": 20,
        "train.checkpoint_every": 200,
        "train.sample_every": 1000,
        "sample.count": 16,
        "sample.batch_size": 16,
    },
}


def get_config(variants: str = "") -> ml_collections.ConfigDict:
    """The config: `small`, predictions, variances and objectives, comma-separated."""
    return apply_variants(default_config(), variants, NAMED)
