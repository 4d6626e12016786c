"""Images: where they come from, and the batches of step N."""

from ddpm_jax.data.pipeline import (
    Batches,
    Gather,
    batch_positions,
    random_flip,
    resident_gather,
    to_float,
    to_uint8,
)
from ddpm_jax.data.records import ReadError, RecordSource
from ddpm_jax.data.sources import ArraySource, Source, fingerprint, nbytes, open_source

__all__ = [
    "ArraySource",
    "Batches",
    "Gather",
    "ReadError",
    "RecordSource",
    "Source",
    "batch_positions",
    "fingerprint",
    "nbytes",
    "open_source",
    "random_flip",
    "resident_gather",
    "to_float",
    "to_uint8",
]
