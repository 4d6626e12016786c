"""The paper's Table 2, prediction × objective × Σ, and what lies beyond it.

    python -m experiments.sweep --sweep=experiments/sweeps/table2.py --workdir=runs/table2 \\
        --seeds=3 --jobs=2

`table2.py` is for the embedded digits: 33 runs in under an hour on two CPU cores.
`table2.py:cifar10` is the paper's own (800,000 steps a cell, 50,000 samples; needs GPUs or TPUs,
and the weights of the Inception network); `table2.py:small` has a network that a CPU can bear.
"""

from ddpm_jax.config import RequestError
from experiments.sweeping import Cell, Stage, Sweep

# {variant: (config, overrides, columns beside bits/dim)}.
DATA = {
    # T = 100: every cell samples with its whole chain, as the paper does with its T = 1000.
    "digits": (
        "configs/digits.py",
        {
            "diffusion.num_steps": 100,
            "train.steps": 800,
            "train.checkpoint_every": 400,
            "train.sample_every": 0,
            "train.keep_checkpoints": 1,
            "evaluation.metrics": ("bits_per_dim", "fd_pixels"),
            "evaluation.max_images": 256,
            "evaluation.count": 500,
            "sample.batch_size": 250,
        },
        {"fd_pixels_500": "FD, pixels, n = 500"},
    ),
    "cifar10": (
        "configs/cifar10.py",
        {
            "evaluation.split": ("test", "train"),
            "evaluation.metrics": ("bits_per_dim", "fid", "is"),
        },
        {"is50k_inception": "IS", "fid50k_inception": "FID"},
    ),
    "small": (
        "configs/cifar10.py:small",
        {
            "model.channels": 16,
            "model.channel_multipliers": (1, 2, 2),
            "model.num_res_blocks": 1,
            "model.attention_resolutions": (8,),
            "model.norm_groups": 8,
            "model.dropout": 0.0,
            "train.sample_every": 0,
            "evaluation.metrics": ("bits_per_dim", "kd_pixels"),
            "evaluation.split": ("test", "train"),
            "evaluation.max_images": 200,
            "evaluation.terms": 30,
            "evaluation.count": 100,
        },
        {"kd_pixels_100": "KD, pixels, n = 100"},
    ),
}
COLUMNS = {
    "bits_per_dim_test": "bits/dim, test",
    "bits_per_dim_train": "bits/dim, train",
    "rate_test": "rate",
    "distortion_test": "distortion",
}
STABILITY = {
    "outside": "out of range",
    "outside_unclipped": "out of range, unclipped",
    "grad_norm_max": "largest gradient norm",
}
# What clipping x̂_0 would hide, of the predictions that it is done for.
UNCLIPPED = Stage("sample", {"sample.clip": False, "sample.count": 128}, name="unclipped")


def cell(prediction: str, objective: str, variance: str, **paper: str) -> Cell:
    """A cell of the three choices, with what the paper has there."""
    overrides = {
        "diffusion.prediction": prediction,
        "train.objective": objective,
        "diffusion.variance": variance,
    }
    return Cell(overrides, paper=paper)


PAPER = [
    cell("mu", "vlb", "learned", IS="7.28 ± 0.10", FID="23.69"),
    cell("mu", "vlb", "fixed_large", IS="8.06 ± 0.09", FID="13.22"),
    cell("mu", "simple", "fixed_large", IS="–", FID="–"),
    cell("eps", "vlb", "learned", IS="–", FID="–"),
    cell("eps", "vlb", "fixed_large", IS="7.67 ± 0.13", FID="13.51"),
    cell("eps", "simple", "fixed_large", IS="9.46 ± 0.11", FID="3.17"),
]
BEYOND = [
    cell("x0", "simple", "fixed_large"),
    cell("v", "simple", "fixed_large"),
    cell("eps", "simple", "fixed_small"),
    cell("eps", "vlb", "learned_range"),
    cell("eps", "hybrid", "learned_range"),
]


def base(variant: str) -> tuple[str, dict, dict]:
    """Config, overrides and columns of a data set."""
    variant = variant or "digits"
    if variant not in DATA:
        raise RequestError(f"unknown variant {variant!r}; choose from {', '.join(DATA)}")
    return DATA[variant]


def get_sweep(variant: str = "") -> Sweep:
    """The sweep for `digits`, `cifar10` or `small`."""
    config, overrides, quality = base(variant)
    return Sweep(
        title=f"Table 2 ({variant or 'digits'})",
        config=config,
        overrides=overrides,
        groups={"the paper's six": PAPER, "beyond": BEYOND},
        stages=(Stage("train"), Stage("evaluate"), UNCLIPPED),
        columns={**COLUMNS, **quality, **STABILITY},
        notes=(
            "Clipping x̂_0, as in sampling and evaluation, keeps all but mu within the range; "
            "`unclipped` are 128 samples without it.",
            "The paper's numbers are of CIFAR-10 (Table 2); “–”: unstable, or poor samples.",
        ),
    )
