"""Sweeps: cells from a small Python file, planned, checked, run anywhere and put into a table."""

from experiments.sweeping.cells import Cell, Stage, Sweep, product, zipped

__all__ = ["Cell", "Stage", "Sweep", "product", "zipped"]
