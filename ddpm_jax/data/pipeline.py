"""Batches by position: the images of optimizer step `step` are a pure function of (seed, step)."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ddpm_jax.config import RequestError
from ddpm_jax.data.records import ATTEMPTS, ReadError, RecordSource, times
from ddpm_jax.data.sources import Source
from ddpm_jax.data.threads import Worker
from ddpm_jax.interruption import Interrupted

READ_AHEAD = 3  # Calls prepared ahead of the one asked for.
STALL_SECONDS = 300.0  # Where the config does not say.
CLOSING_SECONDS = 2.0  # For a read that is under way, at the end.
SLICE_SECONDS = 0.5  # Of waiting for a batch, between two questions whether to stop.
Gather = Callable[[np.ndarray], jax.Array]  # See `resident_gather`.


def batch_positions(seed: int, step: int, batch_size: int, num_images: int) -> np.ndarray:
    """int64 [batch_size]: the positions of the images in batch number `step`, from 0.

    The batches cut an endless stream of epochs into pieces; each epoch is a permutation of all
    images that depends on (seed, epoch) alone. A batch may straddle epochs.
    """
    epochs, places = np.divmod(step * batch_size + np.arange(batch_size), num_images)
    return np.concatenate(
        [
            _permutation(seed, int(epoch), num_images)[places[epochs == epoch]]
            for epoch in np.unique(epochs)
        ]
    )


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    # Sorting raw bits, which NumPy promises never to change, as it does not of `permutation`.
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_images)
    return np.argsort(bits, kind="stable").astype(np.int64)


def to_float(images: jax.Array) -> jax.Array:
    """float32 in [−1, 1] from uint8: x / 127.5 − 1, of any shape.

    Written so that 0 and 255 become −1 and 1 exactly: XLA multiplies by the reciprocal of a
    constant divisor, and x / 127.5 − 1 then reaches 1.0000001.
    """
    return (2 * jnp.asarray(images, jnp.float32) - 255) / 255


def to_uint8(images: jax.Array) -> jax.Array:
    """uint8 from floats in [−1, 1], rounded to the nearest level; values beyond are clipped."""
    return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def random_flip(images: jax.Array, flip: jax.Array) -> jax.Array:
    """Mirrors left to right the images [batch, h, w, c] whose `flip`, bool [batch], is set.

    Drawing `flip` is the caller's part.
    """
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


class Batches:
    """The batches of a run, on the devices: `batches(step)` gives those from that step on.

    Resident, the whole source is on every device, and a batch is a gather from it. Otherwise each
    process reads the rows of its own devices. Either is done in a thread that keeps READ_AHEAD
    calls ready while steps are asked for in order; any other step restarts it. A thread whose
    images do not come in time is left to itself, and another one reads them again; none is waited
    for when the process ends.

    Attributes:
      wait_seconds: how long calls have waited for data; whoever logs it sets it back to 0.

    Args:
      source: the images.
      seed: the seed of their order.
      batch_size: images a step, over all processes.
      steps_per_call: steps a call.
      sharding: of [steps_per_call, batch_size, h, w, c]; only axis 1 may be split.
      resident: whether the source is put on the devices; or, where it is there, the gather from it.
      stall_seconds: how long a call waits for its images before they are read again; 0: for ever.
      attempts: how often they are read in all, where they do not come.
      stop: whether not to wait any longer for a batch, asked while one does not come.

    Raises:
      RequestError: batch_size does not divide over the devices.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        batch_size: int,
        steps_per_call: int,
        sharding: NamedSharding,
        resident: bool | Gather,
        *,
        stall_seconds: float = STALL_SECONDS,
        attempts: int = ATTEMPTS,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.wait_seconds = 0.0
        self._source, self._seed, self._sharding = source, seed, sharding
        self._shape = (steps_per_call, batch_size, *source.image_shape)
        try:
            sharding.shard_shape(self._shape)
        except ValueError as error:
            raise RequestError(
                f"config.train.batch_size={batch_size}: must divide over the devices of the mesh "
                f"{dict(sharding.mesh.shape)}"
            ) from error
        self._gather = resident_gather(source, sharding) if resident is True else resident
        # A gather can only wait for its devices, which is noticed elsewhere.
        self._stall_seconds = 0.0 if self._gather else stall_seconds
        self._attempts, self._stop = attempts, stop
        self._reader = self._new_reader()
        self._ahead: collections.deque[tuple[int, concurrent.futures.Future]] = collections.deque()

    def __call__(self, step: int) -> jax.Array:
        """uint8 [steps_per_call, batch, h, w, c], sharded: batches `step`, `step` + 1, ….

        Raises:
          records.ReadError: names the file or record that could not be read, or the source whose
            images did not come.
          Interrupted: `stop` said so, and the batch is not there.
        """
        start = time.perf_counter()
        try:
            return self._taken(step)
        finally:
            self.wait_seconds += time.perf_counter() - start

    def _positions(self, step: int) -> np.ndarray:
        steps_per_call, batch_size = self._shape[:2]
        steps = range(step, step + steps_per_call)
        return np.stack(
            [batch_positions(self._seed, s, batch_size, len(self._source)) for s in steps]
        )

    def _taken(self, step: int) -> jax.Array:
        """The call's batches from those read ahead, after asking for the next ones."""
        if self._ahead and self._ahead[0][0] != step:
            self._forget()
        for attempt in range(1, self._attempts + 1):
            while len(self._ahead) <= READ_AHEAD:
                following = self._ahead[-1][0] + self._shape[0] if self._ahead else step
                self._ahead.append((following, self._reader.submit(following)))
            if self._come(self._ahead[0][1]):
                return self._ahead.popleft()[1].result()
            problem = self._stalled(step)
            self._forget()
            self._reader.leave()
            self._reader = self._new_reader()
            if attempt < self._attempts:
                logging.getLogger(__name__).warning(
                    "%s; reading them again, attempt %d of %d", problem, attempt + 1, self._attempts
                )
        raise ReadError(
            f"{problem}, asked {times(self._attempts)}; mend the storage, or allow more time with "
            "--config.data.stall_seconds"
        )

    def _come(self, batch: concurrent.futures.Future) -> bool:
        """Whether a batch is there in time, or could not be read.

        Raises:
          Interrupted: `stop` said so meanwhile.
        """
        began = time.monotonic()
        while not batch.done():
            left = (self._stall_seconds or math.inf) - (time.monotonic() - began)
            if left <= 0:
                return False
            # Not the result's own time limit, whose error could be one of reading.
            concurrent.futures.wait([batch], min(left, SLICE_SECONDS))
            if not batch.done() and self._stop():
                raise Interrupted("stopped while waiting for images")
        return True

    def _stalled(self, step: int) -> str:
        """What did not come, and where its reading hangs, if that is known."""
        where = None
        if isinstance(self._source, RecordSource):
            where = self._source.slowest(since=self._reader.began)
        return (
            f"the images of step {step} have not come for {self._stall_seconds:g} s "
            f"({self._source.name} {self._source.split}{f', reading {where}' if where else ''})"
        )

    def _forget(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _new_reader(self) -> Worker:
        return Worker(self._read, "read-ahead")

    def _read(self, step: int) -> jax.Array:
        if self._gather:
            return self._gather(self._positions(step))
        rows = np.arange(self._shape[1])
        indices = self._sharding.addressable_devices_indices_map(self._shape).values()
        local = np.unique(np.concatenate([rows[index[1]] for index in indices]))
        positions = self._positions(step)[:, local]
        images = self._source.images(positions.ravel())
        images = images.reshape(*positions.shape, *self._source.image_shape)

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            mine = rows[index[1]]
            first = np.searchsorted(local, mine[0])
            return images[:, first : first + len(mine)]

        return jax.make_array_from_callback(self._shape, self._sharding, shard)

    def close(self) -> None:
        """Stops reading ahead, and does not wait for a read that hangs; batches stay valid."""
        self._reader.leave(CLOSING_SECONDS)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def resident_gather(source: Source, sharding: NamedSharding) -> Gather:
    """Puts all images on every device of the mesh; gives positions [k, n] -> [k, n, h, w, c].

    The answer is sharded as `sharding` says, and every device gathers its own part of it.
    """
    images = source.images(np.arange(len(source)))
    image_shape = images.shape[1:]
    tables = {device: jax.device_put(images, device) for device in sharding.addressable_devices}
    gather = jax.jit(lambda table, positions: table[positions])

    def batches(positions: np.ndarray) -> jax.Array:
        shape = *positions.shape, *image_shape
        small = positions.astype(np.int32)
        # A program a device: those of several hosts would have to start in the same order on each.
        parts = [
            gather(tables[device], jax.device_put(small[index[:2]], device))
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        ]
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    return batches
