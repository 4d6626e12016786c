"""What a sweep is: named lists of cells, each a set of config overrides.

def get_sweep(variant: str = "") -> Sweep:
    return Sweep(
        title="Learning rate and prediction",
        config="configs/digits.py",
        overrides={"train.steps": 500},
        groups={
            "grid": product({"diffusion.prediction": ("eps", "v"), "train.batch_size": (32, 64)}),
            "one more": [Cell({"diffusion.prediction": "x0"})],
        },
    )
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ddpm_jax import config as config_lib
from ddpm_jax.config import RequestError


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of the table: a run for each seed.

    Attributes:
      overrides: {dotted config key: value}, on top of the sweep's own.
      name: of its directory; made of the overrides, unless given.
      skip: the reason why it is not run; it keeps its place in the table.
      paper: {column: what the paper reports there}.
    """

    overrides: Mapping[str, Any]
    name: str = ""
    skip: str = ""
    paper: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or name_of(self.overrides))
        if not re.fullmatch(r"[\w.,=+-]+", self.name) or self.name.startswith("."):
            raise RequestError(f"cell {self.name!r}: a name is letters, digits and . , = + - _")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A mode of ddpm_jax.main that every run goes through, with overrides of its own."""

    mode: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.mode)
        if self.mode not in ("train", "evaluate", "sample"):
            raise RequestError(
                f"stage {self.name}: mode {self.mode} is not train, evaluate, sample"
            )


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What `get_sweep` of a sweep's file returns.

    Attributes:
      title: of the table.
      config: a file of configs/, with variants after a colon.
      groups: {name: cells}, in the table's order.
      overrides: of every cell.
      stages: in order; the first one trains.
      columns: {result: heading} of the table and the figure; whatever all runs have, unless given.
      notes: lines below the table.
    """

    title: str
    config: str
    groups: Mapping[str, Sequence[Cell]]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stages: Sequence[Stage] = (Stage("train"), Stage("evaluate"))
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def cells(self) -> list[Cell]:
        """All cells, of all groups."""
        return list(itertools.chain.from_iterable(self.groups.values()))


def name_of(overrides: Mapping[str, Any]) -> str:
    """A readable name: the paper's three choices by their values, anything else as leaf=value."""
    words = []
    for key, value in overrides.items():
        if isinstance(value, (tuple, list)):
            value = ",".join(map(str, value))
        leaf = key.rpartition(".")[2]
        words.append(str(value) if key in config_lib.VARIANT_KEYS else f"{leaf}={value}")
    name = "-".join(words) or "base"
    return re.sub(r"[^\w.,=+-]", "_", name)


def product(axes: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """A cell for each combination of the values of the axes, the last axis fastest."""
    return [
        Cell(dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())
    ]


def zipped(axes: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """A cell for each position: the axes' values side by side.

    Raises:
      RequestError: axes of unequal length.
    """
    if len({len(values) for values in axes.values()}) > 1:
        lengths = ", ".join(f"{key} {len(values)}" for key, values in axes.items())
        raise RequestError(f"zipped axes have unequal lengths: {lengths}")
    return [Cell(dict(zip(axes, values, strict=True))) for values in zip(*axes.values())]  # noqa: B905


def load_sweep(argument: str) -> Sweep:
    """The sweep of `path.py` or `path.py:variant`.

    Raises:
      RequestError: no such file, one that fails, two cells of one name, or no cells.
    """
    path, _, variant = argument.partition(":")
    file = pathlib.Path(path)
    if not file.is_file() or file.suffix != ".py":
        near = sorted(p.name for p in file.parent.glob("*.py") if not p.name.startswith("_"))
        listing = f"; there are {', '.join(near)}" if near else ""
        raise RequestError(f"--sweep={argument}: no file {path}{listing}")
    spec = importlib.util.spec_from_file_location(f"sweep_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        sweep = module.get_sweep(variant)
    except RequestError as error:
        raise RequestError(f"--sweep={argument}: {error}") from error
    except Exception as error:  # Whatever the user's file does.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RequestError(f"--sweep={argument}: {path} fails: {reason}") from error
    if not isinstance(sweep, Sweep):
        raise RequestError(f"--sweep={argument}: get_sweep of {path} returns no Sweep")
    if not sweep.cells:
        raise RequestError(f"--sweep={argument}: the sweep has no cells")
    if not sweep.stages or sweep.stages[0].mode != "train":
        raise RequestError(f"--sweep={argument}: the first stage must be Stage('train')")
    for what in (sweep.cells, sweep.stages):
        names = [x.name for x in what]
        double = next((name for name in names if names.count(name) > 1), None)
        if double:
            raise RequestError(
                f"--sweep={argument}: two of the name {double}: their overrides are equal, or give "
                "them different names"
            )
    return sweep
