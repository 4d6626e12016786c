"""The embedded 8×8 digits: a DDPM in minutes on a CPU.

    python -m ddpm_jax.main --config=configs/digits.py --workdir=runs/digits
    python -m ddpm_jax.main --config=configs/digits.py:mu,vlb,learned --workdir=runs/digits_mu

Cost: four to five minutes on two CPU cores.
Expected: digits that anyone recognises; see the README for what a classifier says of them.
Evaluation takes 30 of the bound's 1,000 terms, stratified: unbiased, and little less precise.
The cosine schedule, since of the linear one's T steps an image of 8×8 is noise for most.
"""

import ml_collections

from ddpm_jax.config import apply_variants, default_config


def get_config(variants: str = "") -> ml_collections.ConfigDict:
    """The config: predictions, variances and objectives, comma-separated."""
    config = default_config()
    config.data.update(name="digits", image_size=8, channels=1, flip=False)
    config.model.update(
        channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        norm_groups=8,
        dropout=0.0,
    )
    config.diffusion.update(schedule="cosine", variance="fixed_small")
    config.train.update(
        steps=2600,
        steps_per_call=10,
        batch_size=64,
        learning_rate=1e-3,
        warmup_steps=100,
        ema_decay=0.998,
        ema_ramp=True,
        timesteps="stratified",
        log_every=50,
        checkpoint_every=650,
        sample_every=1300,
    )
    config.evaluation.update(
        metrics=("bits_per_dim", "fd_pixels", "kd_pixels", "nearest_pixels"),
        split=("test", "train"),
        terms=30,
        count=1000,
    )
    return apply_variants(config, variants)
