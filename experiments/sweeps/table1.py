"""The paper's Table 1 on CIFAR-10: L against L_simple, sample quality and bits/dim.

    python -m experiments.sweep --sweep=experiments/sweeps/table1.py:cifar10 --workdir=runs/table1

Variants as in table2.py, of which these are two cells.
"""

import dataclasses

from experiments.sweeping import Sweep
from experiments.sweeps import table2

TABLE1 = {
    "eps-vlb-fixed_large": {
        "IS": "7.67 ± 0.13",
        "FID": "13.51",
        "bits/dim, test": "≤ 3.70",
        "bits/dim, train": "3.69",
    },
    "eps-simple-fixed_large": {
        "IS": "9.46 ± 0.11",
        "FID": "3.17",
        "bits/dim, test": "≤ 3.75",
        "bits/dim, train": "3.72",
    },
}


def get_sweep(variant: str = "") -> Sweep:
    """The sweep for `digits`, `cifar10` or `small`."""
    sweep = table2.get_sweep(variant)
    cells = [
        dataclasses.replace(cell, paper=TABLE1[cell.name])
        for cell in table2.PAPER
        if cell.name in TABLE1
    ]
    return dataclasses.replace(
        sweep,
        title=f"Table 1 ({variant or 'digits'})",
        groups={"L and L_simple": cells},
        notes=("The paper's numbers are of CIFAR-10 (Table 1).",),
    )
