"""Batches by position, on one device, on eight and over two processes."""

import concurrent.futures
import logging
import os
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddpm_jax.data import (
    ArraySource,
    Batches,
    ReadError,
    RecordSource,
    batch_positions,
    pipeline,
    random_flip,
    threads,
    to_float,
    to_uint8,
)
from ddpm_jax.interruption import Interrupted

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 2, 3, 1)).astype(np.uint8)


def stream(seed, batch_size, num_images, length):
    steps = range(-(-length // batch_size))
    return np.concatenate([batch_positions(seed, s, batch_size, num_images) for s in steps])[
        :length
    ]


def one_device():
    return NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec(None, "data"))


def expected(images, seed, step, batch_size, steps):
    positions = [batch_positions(seed, step + i, batch_size, len(images)) for i in range(steps)]
    return images[np.stack(positions)]


# Positions.


@pytest.mark.parametrize("batch_size", [1, 4, 10, 23])
def test_every_image_once_an_epoch(batch_size):
    epochs = stream(0, batch_size, 10, 50).reshape(5, 10)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (5, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 5
    np.testing.assert_array_equal(epochs.ravel(), stream(0, 7, 10, 50))


def test_seeds_differ():
    assert len({tuple(stream(seed, 10, 10, 10)) for seed in range(20)}) == 20


def test_permutations_are_uniform():
    epochs = stream(3, 5, 5, 5 * 4000).reshape(4000, 5)
    counts = (epochs[:, :, None] == np.arange(5)).sum(0)
    assert np.abs(counts - 800).max() < 5 * np.sqrt(4000 * 0.2 * 0.8)


def test_positions_stay_what_they_were():
    """Resuming a run with a newer NumPy must see the same batches."""
    positions = batch_positions(1, 1, 8, 10)
    assert positions.dtype == np.int64
    assert positions.tolist() == [1, 4, 0, 6, 5, 3, 4, 9]


def test_positions_in_a_fresh_process():
    code = "from ddpm_jax.data import batch_positions as b; print(b(5, 1000, 6, 1541).tolist())"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    batch_positions(5, 0, 6, 1541)
    assert out.stdout.strip() == str(batch_positions(5, 1000, 6, 1541).tolist())


# Pixels.


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_levels_round_trip(wrap):
    levels = jnp.arange(256, dtype=jnp.uint8)
    floats = wrap(to_float)(levels)
    assert floats.dtype == jnp.float32
    assert floats[0] == -1 and floats[-1] == 1 and jnp.abs(floats).max() == 1
    np.testing.assert_allclose(floats, np.arange(256) / 127.5 - 1, atol=1e-7)
    back = wrap(to_uint8)(floats)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, levels)


def test_to_uint8_rounds_and_clips():
    floats = np.arange(256) / 127.5 - 1
    for off in (-0.49, 0.49):
        np.testing.assert_array_equal(to_uint8(jnp.float32(floats + off / 127.5)), np.arange(256))
    np.testing.assert_array_equal(to_uint8(jnp.float32([-1.5, 1.5])), [0, 255])


def test_random_flip():
    flip = np.arange(10) % 3 == 0
    flipped = jax.jit(random_flip)(IMAGES, flip)
    assert flipped.dtype == jnp.uint8
    for image, before, turned in zip(flipped, IMAGES, flip, strict=True):
        np.testing.assert_array_equal(image, np.fliplr(before) if turned else before)


# Batches.


@pytest.mark.parametrize("resident", [True, False])
def test_batches_in_and_out_of_order(resident):
    source = ArraySource("made", "train", IMAGES)
    with Batches(source, 7, 4, 3, one_device(), resident) as batches:
        for step in (0, 3, 6, 9, 12, 5, 8, 300, 0):
            batch = batches(step)
            assert isinstance(batch, jax.Array) and batch.dtype == jnp.uint8
            np.testing.assert_array_equal(batch, expected(IMAGES, 7, step, 4, 3))


class SlowSource(ArraySource):
    """Takes its time, and counts how often it is asked."""

    asked = 0

    def images(self, positions):
        time.sleep(0.2)
        self.asked += 1
        return super().images(positions)


def test_reads_ahead_a_few_calls_and_stops(monkeypatch):
    monkeypatch.setattr(pipeline, "CLOSING_SECONDS", 60)  # However busy the machine is.
    source = SlowSource("slow", "train", IMAGES)
    before = threading.enumerate()  # Among them those that other tests left to hang.
    batches = Batches(source, 0, 2, 3, one_device(), resident=False)
    (reader,) = [t for t in threading.enumerate() if t not in before and t.name == "read-ahead"]
    batches(0)
    assert batches.wait_seconds > 0.19
    time.sleep(1.2)
    assert source.asked == 4  # The call's, and three ahead.
    batches.wait_seconds = 0.0
    batches(3)
    assert batches.wait_seconds < 0.1  # It was there.
    batches.close()
    batches.close()
    assert source.asked <= 5
    assert not reader.is_alive()


def test_a_gather_is_asked_ahead_as_well_and_has_no_time_limit():
    """What is on the devices comes when these come to it: reading it again would not help."""
    asked = []

    def gather(positions):
        asked.append(threading.current_thread().name)
        time.sleep(0.3 if len(asked) == 1 else 0)
        return jnp.asarray(IMAGES[positions])

    source = ArraySource("made", "train", IMAGES)
    with Batches(source, 0, 2, 3, one_device(), gather, stall_seconds=0.1, attempts=1) as batches:
        np.testing.assert_array_equal(batches(0), expected(IMAGES, 0, 0, 2, 3))
        until = time.monotonic() + 60
        while len(asked) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        assert asked == ["read-ahead"] * 4


def test_an_unreadable_image_surfaces_where_it_is_needed():
    def read(position):
        if position == bad:
            raise OSError("truncated")
        return (IMAGES[position],)

    bad = int(batch_positions(0, 2, 2, 10)[0])
    source = RecordSource("made", "train", (2, 3, 1), 10, read, lambda p: f"image {p}.png", [])
    with Batches(source, 0, 2, 1, one_device(), resident=False) as batches:
        np.testing.assert_array_equal(batches(0), expected(IMAGES, 0, 0, 2, 1))
        np.testing.assert_array_equal(batches(1), expected(IMAGES, 0, 1, 2, 1))
        with pytest.raises(ReadError, match=f"image {bad}.png cannot be read .OSError: truncated"):
            batches(2)
        np.testing.assert_array_equal(batches(3), expected(IMAGES, 0, 3, 2, 1))


EIGHT = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ddpm_jax.config import RequestError
from ddpm_jax.data import ArraySource, Batches
source = ArraySource("made", "train", np.load(sys.argv[1]))
devices = np.array(jax.devices())
flat = NamedSharding(Mesh(devices, ("data",)), P(None, "data"))
grid = NamedSharding(Mesh(devices.reshape(4, 2), ("data", "model")), P(None, "data"))
out = {}
for name, sharding in {"flat": flat, "grid": grid}.items():
    for resident in (True, False):
        with Batches(source, 7, 8, 3, sharding, resident) as batches:
            batch = batches(6)
        assert batch.sharding.is_equivalent_to(sharding, batch.ndim), batch.sharding
        out[f"{name} {resident}"] = np.asarray(batch)
np.savez(sys.argv[2], **out)
try:
    Batches(source, 7, 12, 3, flat, True)
except RequestError as error:
    print(error)
"""


def test_eight_devices_equal_one(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    arguments = [sys.executable, "-c", EIGHT, tmp_path / "images.npy", tmp_path / "out.npz"]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    run = subprocess.run(arguments, env=os.environ | flags, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("config.train.batch_size=12: must divide over the devices")
    out = np.load(tmp_path / "out.npz")
    assert len(out) == 4
    for batch in out.values():
        np.testing.assert_array_equal(batch, expected(IMAGES, 7, 6, 8, 3))


TWO = """
import sys, jax, numpy as np
port, process, images, out = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ddpm_jax.data import ArraySource, Batches
class Counted(ArraySource):
    rows = 0
    def images(self, positions):
        self.rows = max(self.rows, len(positions))
        return super().images(positions)
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P(None, "data"))
for resident in (True, False):
    source = Counted("made", "train", np.load(images))
    with Batches(source, 7, 8, 3, sharding, resident) as batches:
        batch = batches(6)
    assert resident or source.rows == 3 * 8 // 2, source.rows
    assert batch.shape[:2] == (3, 8)
    mine = sorted(batch.addressable_shards, key=lambda shard: shard.index[1].start)
    np.save(f"{out}/{process} {resident}.npy", np.concatenate([s.data for s in mine], 1))
"""


def test_two_processes_equal_one(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(port), str(i), tmp_path / "images.npy", tmp_path],
            env=os.environ | flags,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    for resident in (True, False):
        halves = [np.load(tmp_path / f"{i} {resident}.npy") for i in range(2)]
        np.testing.assert_array_equal(np.concatenate(halves, 1), expected(IMAGES, 7, 6, 8, 3))


# Reads that never end.


class Stuck(RecordSource):
    """Ten images; reading those at `stuck` waits until `go` is set."""

    def __init__(self, stuck):
        self.stuck, self.go, self.waiting = set(stuck), threading.Event(), 0

        def read(position):
            if position in self.stuck:
                self.waiting += 1
                assert self.go.wait(300)
            return (IMAGES[position],)

        where = "image {}.png".format
        super().__init__("made", "train", (2, 3, 1), 10, read, where, [])


@pytest.fixture
def stuck():
    """Batch 2 of these has an image that does not come."""
    source = Stuck([batch_positions(0, 2, 2, 10)[1]])
    yield source
    source.go.set()


def test_images_that_do_not_come_are_read_again_by_another_thread(stuck, caplog):
    [bad] = stuck.stuck
    kwargs = {"stall_seconds": 0.5, "attempts": 100}  # Others may be slow here, but not for long.
    with Batches(stuck, 0, 2, 1, one_device(), resident=False, **kwargs) as batches:
        batches(0), batches(1)

        def release(record):
            stuck.stuck.clear()  # For those who ask again; the first thread stays where it is.
            return True

        logging.getLogger("ddpm_jax.data.pipeline").addFilter(release)
        try:
            for step in (2, 3, 4):
                np.testing.assert_array_equal(batches(step), expected(IMAGES, 0, step, 2, 1))
        finally:
            logging.getLogger("ddpm_jax.data.pipeline").removeFilter(release)
        assert not stuck.go.is_set()
    assert caplog.messages[0] == (
        "the images of step 2 have not come for 0.5 s (made train, reading "
        f"image {bad}.png); reading them again, attempt 2 of 100"
    )


def test_images_that_never_come(stuck, caplog):
    [bad] = stuck.stuck
    with Batches(
        stuck, 0, 2, 1, one_device(), resident=False, stall_seconds=0.3, attempts=3
    ) as batches:
        with pytest.raises(ReadError) as caught:
            batches(2)
        assert str(caught.value) == (
            "the images of step 2 have not come for 0.3 s (made train, reading "
            f"image {bad}.png), asked 3 times; mend the storage, or allow more time with "
            "--config.data.stall_seconds"
        )
        assert [m[-14:] for m in caplog.messages] == ["attempt 2 of 3", "attempt 3 of 3"]
        limit = time.monotonic() + 60
        while stuck.waiting < 3 and time.monotonic() < limit:
            time.sleep(0.01)
        assert stuck.waiting == 3


def test_who_shall_stop_does_not_wait_for_images(stuck):
    """What is there is given all the same."""
    stop = threading.Event()
    with Batches(stuck, 0, 2, 1, one_device(), resident=False, stop=stop.is_set) as batches:
        batches(0)
        threading.Timer(0.2, stop.set).start()
        with pytest.raises(Interrupted):
            batches(2)
        stuck.go.set()
        batches._ahead[0][1].result(60)
        np.testing.assert_array_equal(batches(2), expected(IMAGES, 0, 2, 2, 1))


def test_a_time_limit_of_zero_is_none(stuck):
    with Batches(stuck, 0, 2, 1, one_device(), resident=False, stall_seconds=0) as batches:
        threading.Timer(0.3, stuck.go.set).start()
        np.testing.assert_array_equal(batches(2), expected(IMAGES, 0, 2, 2, 1))


def test_a_reading_error_of_time_is_no_stall():
    class Late(ArraySource):
        def images(self, positions):
            raise TimeoutError("by the file system")

    source = Late("made", "train", IMAGES)
    with (
        Batches(source, 0, 2, 1, one_device(), resident=False) as batches,
        pytest.raises(TimeoutError, match="by the file system"),
    ):
        batches(0)


def test_closing_does_not_wait_for_a_read_that_hangs(stuck, monkeypatch):
    monkeypatch.setattr(pipeline, "CLOSING_SECONDS", 0.05)
    batches = Batches(stuck, 0, 2, 1, one_device(), resident=False)
    batches(0)  # Step 2 is read ahead.
    closing = threading.Thread(target=batches.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive() and not stuck.go.is_set()


def test_a_worker_that_left_begins_nothing_more():
    begun, go = [], threading.Event()

    def work(number):
        begun.append(number)
        return go.wait(60) and number

    worker = threads.Worker(work, "worker")
    futures = [worker.submit(number) for number in range(3)]
    while not begun:
        time.sleep(0.01)
    worker.leave()
    go.set()
    assert futures[0].result(60) == 0
    concurrent.futures.wait(futures, 60)
    assert [future.cancelled() for future in futures] == [False, True, True] and begun == [0]


HANG = """
import threading, numpy as np, jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ddpm_jax.data import Batches, RecordSource
read = lambda position: threading.Event().wait()
source = RecordSource("made", "train", (2, 3, 1), 10, read, "image {}.png".format, [])
one = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P(None, "data"))
Batches(source, 0, 2, 1, one, resident=False, stall_seconds=0.1, attempts=2)(0)
"""


def test_a_process_ends_whose_reads_hang():
    run = subprocess.run(
        [sys.executable, "-c", HANG], capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 1
    assert "ReadError: the images of step 0 have not come for 0.1 s (made train" in run.stderr


def test_hanging_reads_of_an_earlier_attempt_are_not_named(stuck):
    [bad] = stuck.stuck
    reading = threading.Thread(target=stuck.images, args=(np.array([bad]),), daemon=True)
    before = time.monotonic()
    reading.start()
    while stuck.slowest(before) is None:
        time.sleep(0.01)
    assert stuck.slowest(before) == f"image {bad}.png"
    assert stuck.slowest(time.monotonic()) is None
    stuck.go.set()
    reading.join()
    assert stuck.slowest(before) is None
