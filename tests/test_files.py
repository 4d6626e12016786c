"""Files that are whole or not there, metrics.jsonl and events on disks that fail."""

import asyncio
import concurrent.futures
import errno
import fcntl
import json
import logging
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from etils import epath
from runs_for_tests import arguments, start

from ddpm_jax import files
from ddpm_jax.config import RequestError, default_config
from ddpm_jax.runs import RunDirectory
from ddpm_jax.training.metrics import Writer, read

ODD = "a b/ünï–cødé [1]*'\"$(x)"


def only(directory):
    """The name of the only file there."""
    (name,) = os.listdir(directory)
    return name


def test_what_a_failed_write_leaves_is_what_was_there(tmp_path):
    path = epath.Path(tmp_path) / ODD / "file"
    files.replace(path, "é before")

    def fails(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace_with(path, fails)
    assert path.read_bytes() == "é before".encode()
    assert only(path.parent) == "file"


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_the_umask_says_who_may_read_as_for_any_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "plain").write_bytes(b"")
        files.replace(epath.Path(tmp_path) / "replaced", b"")
        files.replace(epath.Path(tmp_path) / "replaced", b"again")
        grown = files.Growing(epath.Path(tmp_path) / "grown")
        grown.append(b"1")
        grown.append(b"2")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode for p in tmp_path.iterdir()}
    assert set(modes.values()) == {modes["plain"]} and modes["plain"] & 0o777 == 0o666 & ~mask


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path):
    blocked = epath.Path(tmp_path) / "file"
    blocked.mkdir()  # A directory in the place of the file, which stops root as well.
    with pytest.raises(OSError) as caught:
        files.replace(blocked, b"x")
    assert not list(tmp_path.glob("*.tmp"))
    path = epath.Path(tmp_path) / "full"
    with pytest.raises(OSError) as caught, limited(10):
        files.replace(path, b"x" * 100)
    assert caught.value.filename == str(path) and caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == ["file"]


def test_names_are_matched_in_a_directory_of_any_name(tmp_path):
    directory = epath.Path(tmp_path) / ODD
    assert files.matching(directory, "*") == []
    directory.mkdir(parents=True)
    for name in ("b.npz", "a.npz", "a.npz.tmp", "A.NPZ", "[1].npz"):
        (directory / name).write_bytes(b"")
    found = files.matching(directory, "*.npz")
    assert [path.name for path in found] == ["[1].npz", "a.npz", "b.npz"]
    assert found[0].parent == directory


class limited:  # noqa: N801 (a context manager)
    """A disk on which files cannot grow beyond so many bytes: RLIMIT_FSIZE of this process."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


def test_leftovers_are_removed_but_no_file_that_is_being_written(tmp_path):
    """Whatever the clock says: the old one is held by a process that writes it."""
    old = time.time() - 2 * files.A_DAY
    for name in ("file.dead.tmp", "file.live.tmp", "file.new.tmp", "other.dead.tmp"):
        (tmp_path / name).write_bytes(b"half")
        if "new" not in name:
            os.utime(tmp_path / name, (old, old))
    hold = f"import fcntl; f = open({str(tmp_path / 'file.live.tmp')!r}, 'ab'); "
    hold += "fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    writer = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    writer.stdout.readline()
    files.replace(epath.Path(tmp_path) / "file", b"")
    writer.communicate(b"\n")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"file", "file.live.tmp", "file.new.tmp", "other.dead.tmp"}


def test_a_file_that_is_being_written_is_held(tmp_path):
    """So that the test above is of what the program does."""
    path = epath.Path(tmp_path) / "file"

    def write(file):
        with open(tmp_path / only(tmp_path), "r+b") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(b"x")

    files.replace_with(path, write)
    assert path.read_bytes() == b"x"


def test_a_name_that_is_no_text_survives_in_json(tmp_path):
    odd = os.fsdecode(b"caf\xe9")  # Latin-1 on a UTF-8 system.
    path = epath.Path(tmp_path) / "file"
    files.replace(path, json.dumps([odd, "é"], ensure_ascii=False))
    assert json.loads(files.read_text(path)) == [odd, "é"]


def test_a_growing_file_mends_itself_after_whatever_happened_to_it(tmp_path):
    path = epath.Path(tmp_path) / "deep" / "file"
    grown = files.Growing(path, b"begin\n")
    grown.append(b"1\n")
    inode = os.stat(path).st_ino
    grown.append(b"2\n")
    assert os.stat(path).st_ino == inode  # It was appended to.
    with limited(os.path.getsize(path) + 4), pytest.raises(OSError) as caught:
        grown.append(b"333333\n")  # Half of it reaches the disk.
    assert caught.value.filename == str(path)
    assert b"3" in path.read_bytes()
    grown.append(b"4\n")
    assert path.read_bytes() == b"begin\n1\n2\n333333\n4\n"
    os.truncate(path, 3)
    grown.append(b"5\n")
    path.unlink()
    grown.append(b"6\n")
    assert path.read_bytes() == b"begin\n1\n2\n333333\n4\n5\n6\n"
    path.parent.rmtree()
    with pytest.raises(FileNotFoundError, match="deep/file"):
        grown.append(b"7\n")
    grown.sync()
    assert path.read_bytes() == b"begin\n1\n2\n333333\n4\n5\n6\n7\n"


class Bucket:
    """A clock and a place of objects, instead of a bucket."""

    def __init__(self, monkeypatch):
        self.now, self.seconds, self.writes, self.broken = 0.0, 0.0, [], False
        monkeypatch.setattr(files, "replace", self.replace)

    def replace(self, path, content):
        self.now += self.seconds
        if self.broken:
            raise OSError(errno.EIO, "unreachable", str(path))
        self.writes.append((self.now, content))


def test_an_object_is_written_whole_and_seldom(monkeypatch):
    bucket = Bucket(monkeypatch)
    grown = files.Growing(epath.Path("gs://b/file"), clock=lambda: bucket.now)
    for second in range(100):
        bucket.now = float(second)
        grown.append(b"%d," % second)
    assert [at for at, _ in bucket.writes] == [0, 30, 60, 90]
    assert bucket.writes[-1][1] == b"".join(b"%d," % k for k in range(91))
    grown.sync()
    grown.sync()
    assert len(bucket.writes) == 5 and bucket.writes[-1][1].endswith(b"99,")
    # Where an outage makes every try last long, trying takes 2 % of the time.
    bucket.seconds, bucket.broken, tried = 40.0, True, 0
    start = bucket.now = 1000.0
    for _ in range(10000):
        bucket.now += 1
        try:
            grown.append(b"x")
        except OSError:
            tried += 1
    assert tried == pytest.approx((bucket.now - start) / 2000, abs=1)


def writer(directory, step=0, **how):
    path = epath.Path(directory)
    return Writer(path, path / "metrics.jsonl", step, lambda r: r["step"] <= step, True, **how)


def steps(directory):
    text = (pathlib.Path(directory) / "metrics.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines()]


def event_values(directory):
    """(step, tag, number or None) of all events, by TensorBoard's own reader."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    found = []
    for path in sorted(pathlib.Path(directory).glob("events.out.tfevents.*")):
        for event in loader.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                number = value.tensor.float_val[0] if value.tensor.float_val else None
                found.append((event.step, value.tag, number))
    return found


def test_events_are_what_tensorboard_reads(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_jax.training.metrics.EVENTS_BYTES", 2000)
    written = writer(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    for step in range(1, 4):
        written.scalars(step, {"loss": 1 / step})
        written.image(step, "samples", picture)
    written.close()
    again = writer(tmp_path, 3)  # In the same second.
    again.scalars(4, {"loss": 0.25})
    again.close()
    assert len(list(tmp_path.glob("events*"))) > 2
    found = event_values(tmp_path)
    losses = [(step, number) for step, tag, number in found if tag == "loss"]
    assert losses == [(k, pytest.approx(1 / k)) for k in range(1, 5)]
    assert [step for step, tag, _ in found if tag == "samples"] == [1, 2, 3]


@pytest.mark.parametrize("failure", ["full", "vanished"])
def test_lines_wait_for_a_disk_that_fails_and_then_all_are_there(tmp_path, failure):
    said = []
    run = tmp_path / "run"
    written = writer(run, write_errors="continue", say=said.append)
    written.scalars(1, {"loss": 1.0})
    if failure == "full":
        size = max(path.stat().st_size for path in run.iterdir())
        with limited(size + 10):  # A part of each record.
            for step in range(2, 50):
                written.scalars(step, {"loss": 1.0})
            written.flush()
    else:
        run.rename(tmp_path / "elsewhere")
        run.write_bytes(b"")  # Not even a directory can be made there.
        for step in range(2, 50):
            written.scalars(step, {"loss": 1.0})
        written.flush()
        run.unlink()
    assert len(said) == 2  # Once for each file.
    assert all("cannot be written" in line and str(run) in line for line in said)
    written.scalars(50, {"loss": 1.0})
    assert steps(run) == list(range(1, 51))
    assert [step for step, tag, _ in event_values(run) if tag == "loss"] == list(range(1, 51))
    assert len(said) == 4
    written.close()


def test_a_bucket_counts_as_back_when_all_is_written_and_not_before(monkeypatch):
    bucket, said = Bucket(monkeypatch), []
    bucket.broken = True
    monkeypatch.setattr(type(epath.Path("gs://b")), "exists", lambda path: False)
    written = writer("gs://b/run", write_errors="continue", say=said.append)
    for step in range(1, 4):
        written.scalars(step, {"loss": 1.0})  # Not yet time to try again.
    assert len(said) == 2 and all("cannot be written" in line for line in said)
    bucket.broken = False
    written.flush()
    assert len(said) == 4 and all("written again" in line for line in said[2:])
    (lines,) = (text for _, text in bucket.writes if text.startswith(b"{"))
    assert lines.count(b"\n") == 3


def test_a_run_that_shall_stop_is_told_the_file(tmp_path):
    written = writer(tmp_path)
    written.scalars(1, {"loss": 1.0})
    with limited(5), pytest.raises(OSError) as caught:
        written.scalars(2, {"loss": 1.0})
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    written.close()  # There is space again.
    assert steps(tmp_path) == [1, 2]


def test_damaged_lines_are_left_out_and_kept_beside(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    damaged = b'{"step": 1, "loss": 1}\n{"st\n\xff\xfe\n3\n{"step": 2}\n' + b"y" * 3_000_000
    damaged += b'\n[1]\n{"loss": 2}\n{"step": 3}\n\n{"step": 4, "lo'
    path.write_bytes(damaged)
    assert [record["step"] for record in read(path)] == [1, 2, 3]
    said = []
    writer(tmp_path, 3, say=said.append).close()
    assert steps(tmp_path) == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert len(said) == 1 and "damaged" in said[0]


def test_a_last_line_cut_short_is_no_damage(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1}\n{"step": 2, "lo')
    writer(tmp_path, 2, say=pytest.fail).close()
    assert path.read_bytes() == b'{"step": 1, "loss": 1}\n'
    assert not (tmp_path / "metrics.jsonl.damaged").exists()


def test_a_long_file_is_read_whole(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    lines = [json.dumps({"step": k, "loss": k / 7, "x": "é" * 20}) for k in range(20000)]
    path.write_bytes("\n".join(lines).encode())  # More than a block; no last newline.
    assert [json.dumps(record) for record in read(path)] == lines


def test_directories_of_any_name_or_behind_a_link(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / ODD)
    (tmp_path / ODD).mkdir(parents=True)
    for name in (f"~/{ODD}", tmp_path / ODD, tmp_path / "link"):
        directory = RunDirectory.of(name)
        directory.save_config(default_config())
        directory.note_start(0)
        written = writer(directory.path)
        written.scalars(1, {"loss": 1.0})
        written.close()
    assert len(directory.load_starts()) == 3
    assert {"config.json", "provenance.json", "metrics.jsonl"} <= set(os.listdir(tmp_path / ODD))
    assert directory.load_config() == default_config()


def test_a_directory_whose_name_is_no_text_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"'.*caf\\udce9' is not UTF-8 text; .* PYTHONUTF8=1"):
        RunDirectory.of(str(tmp_path / os.fsdecode(b"caf\xe9")))


def test_a_run_in_the_c_locale(tmp_path, monkeypatch):
    """Its directory has letters that no old locale knows."""
    monkeypatch.setenv("LC_ALL", "C")
    process = start(arguments(tmp_path / ODD, train__steps=5))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    (record,) = (tmp_path / ODD / "metrics.jsonl").read_text().splitlines()
    assert json.loads(record)["step"] == 5
    assert RunDirectory.of(tmp_path / ODD).load_config().train.steps == 5


def test_without_gcsfs_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RequestError, match=r"gs://b/x: .*pip install 'ddpm_jax\[gcs\]'"):
        RunDirectory.of("gs://b/x")


def test_a_bucket_that_cannot_be_reached_is_refused(monkeypatch):
    def answer(path, ask):
        raise TimeoutError(errno.ETIMEDOUT, "no answer within 20 s", path)

    monkeypatch.setattr(files, "answer", answer)
    with pytest.raises(RequestError, match="gs://b/x cannot be reached: no answer within 20 s"):
        RunDirectory.of("gs://b/x")


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    with limited(10), pytest.raises(RequestError, match=r"cannot be written: File too large"):
        RunDirectory.of(tmp_path).save_config(default_config())


def test_a_remote_place_that_does_not_answer_is_an_error_in_time():
    """Its libraries would go on trying for minutes."""
    never = threading.Event()
    with pytest.raises(OSError, match=r"no answer within 0\.1 s; tried 1 times") as caught:
        files.answer("gs://b/run", never.wait, seconds=0.1)
    never.set()
    assert caught.value.filename == "gs://b/run"


def test_a_bucket_that_has_just_not_answered_is_not_waited_for_as_long(monkeypatch):
    """Whatever ends then has several files to write; other buckets may be well."""
    monkeypatch.setattr(files, "_SILENT", {})
    monkeypatch.setattr(files, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(files, "AGAIN_SECONDS", 0.1)
    never = threading.Event()

    def waited(path):
        with pytest.raises(TimeoutError) as caught:
            files.answer(path, never.wait)
        return float(caught.value.strerror.split()[3])

    found = [waited(path) for path in ("gs://b/x", "gs://b/y", "gs://c/x", "gs://b/x")]
    assert found == [0.2, 0.1, 0.2, 0.1]
    monkeypatch.setattr(files, "SILENT_SECONDS", 0.0)
    assert waited("gs://b/x") == 0.2
    never.set()


def test_what_is_asked_at_the_same_time_counts_its_own_tries():
    asyn = pytest.importorskip("fsspec.asyn")
    log, both = logging.getLogger("gcsfs"), threading.Barrier(2)

    async def fails(count):
        for k in range(count):
            log.debug("_request retrying after exception: %s", f"number {k}")
            await asyncio.sleep(0.01)
        raise ConnectionError("gone")

    def ask(count):
        both.wait(60)
        asyn.sync(asyn.get_loop(), fails, count)

    def work(count):
        with pytest.raises(OSError, match=rf"gone \(tried {count + 1} times\)"):
            files.answer(f"gs://b/{count}", lambda: ask(count), seconds=60)
        return count

    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert list(pool.map(work, (2, 5))) == [2, 5]


def test_whatever_a_remote_place_raises_is_an_error_that_names_it():
    class HttpError(Exception):
        pass

    def ask():
        raise HttpError("denied\nlong text")

    with pytest.raises(OSError, match="HttpError: denied") as caught:
        files.answer("gs://b/run", ask)
    assert caught.value.filename == "gs://b/run"
