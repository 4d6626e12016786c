"""Runs in a bucket, against an emulator in a process of its own.

What uses the bucket runs in other processes as well: their libraries are told once where it is.
What they leave is read here by plain HTTP.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import numpy as np
import pytest
from etils import epath
from runs_for_tests import ROOT, arguments, start, train

from ddpm_jax import figures, files, lock, parts
from ddpm_jax.config import default_config
from ddpm_jax.interruption import Interrupted
from ddpm_jax.main import main
from ddpm_jax.runs import RunDirectory
from ddpm_jax.training.metrics import Writer, read

pytest.importorskip("gcsfs")
gcs = pytest.importorskip("gcs_for_tests")

CLOCKS = ("time/", "steps_per", "images_per", "seconds_")


class Bucket:
    """The objects of gs://bkt, as anybody sees them."""

    def __init__(self, port):
        self.address = f"http://127.0.0.1:{port}"

    def names(self, prefix):
        url = f"{self.address}/storage/v1/b/bkt/o?prefix={urllib.parse.quote(prefix)}"
        with urllib.request.urlopen(url) as answer:
            return {item["name"].removeprefix(prefix) for item in json.load(answer)["items"]}

    def read(self, name):
        url = f"{self.address}/storage/v1/b/bkt/o/{urllib.parse.quote(name, safe='')}?alt=media"
        with urllib.request.urlopen(url) as answer:
            return answer.read()

    def write(self, name, content):
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        request = urllib.request.Request(
            f"{self.address}/upload/storage/v1/b/bkt/o?{query}", data=content, method="POST"
        )
        urllib.request.urlopen(request).close()


def serve():
    """The process and the port of an empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/gcs_for_tests.py"), str(number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert server.stdout.readline()
    return server, number


@pytest.fixture(scope="module")
def port():
    """The port of a bucket that is empty at first."""
    server, number = serve()
    yield number
    server.communicate(timeout=60)


@pytest.fixture
def bucket(port, monkeypatch):
    """The bucket, for processes that are started from here."""
    for name, value in gcs.environment(port).items():
        monkeypatch.setenv(name, value)
    return Bucket(port)


def finished(process):
    """What a process said that ends well."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, f"{output}\n{errors}"
    return output


def use_files(port):
    """What is written to a run directory, one kind of file after another; in another process."""
    bucket = Bucket(port)
    directory = RunDirectory.of("gs://bkt/ünï 1")
    directory.save_config(default_config())
    directory.save_config(default_config())
    directory.note_start(0)
    directory.note_start(7)
    assert directory.load_config() == default_config()
    assert [entry["from_step"] for entry in directory.load_starts()] == [0, 7]

    # What others write meanwhile is seen, in full.
    assert {path.name for path in directory.path.iterdir()} == {"config.json", "provenance.json"}
    bucket.write("ünï 1/provenance.json", b'[{"from_step": 9}]' + b" " * 10000)
    bucket.write("ünï 1/new", b"new")
    assert len(directory.provenance.read_bytes()) == 10018
    assert (directory.path / "new").exists()

    writer = Writer(directory.path, directory.metrics, 0, lambda record: True, True)
    for step in range(1, 6):
        writer.scalars(step, {"loss": 1 / step})
    assert bucket.read("ünï 1/metrics.jsonl").count(b"\n") == 0  # Not every 30 seconds yet.
    writer.flush()
    assert [record["step"] for record in read(directory.metrics)] == [1, 2, 3, 4, 5]
    writer.image(6, "samples", np.zeros((8, 8, 3), np.uint8))
    writer.scalars(6, {"loss": 1 / 6})
    writer.close()

    figures.save_png(directory.samples / "black.png", np.zeros((8, 8, 1), np.uint8))
    _collect_in_two_goes(directory.path / "x.parts")
    large = np.random.default_rng(0).integers(0, 256, 6_000_000, np.uint8)  # In several requests.
    files.replace_with(directory.path / "large.npz", lambda file: np.savez(file, x=large))
    np.testing.assert_array_equal(parts.read(directory.path / "large.npz")["x"], large)

    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace_with(directory.path / "new", half)
    assert bucket.read("ünï 1/new") == b"new"
    with pytest.raises(FileNotFoundError, match="no such object or bucket: 'gs://none/x'"):
        files.replace(epath.Path("gs://none/x"), b"")
    _take_and_lose(directory.path, bucket)
    _nobody_answers()


def _collect_in_two_goes(directory):
    said, asked = [], iter([False, False, True])

    def compute(begin, length):
        said.append(begin)
        return {"x": np.arange(begin, begin + length)}

    def collect(stop):
        return parts.collect(10, 3, compute, "image", print, directory, {"p": 1}, stop)

    with pytest.raises(Interrupted):
        collect(lambda: next(asked))
    whole = collect(lambda: False)["x"]
    np.testing.assert_array_equal(whole, np.arange(10))
    assert said == [0, 3, 6, 9]


def _take_and_lose(directory, bucket):
    with lock.hold(directory, pytest.fail, pause=lambda seconds: None) as held:
        held.renew()
        assert json.loads(bucket.read("ünï 1/lock"))["pid"] == os.getpid() and not held.lost
        bucket.write("ünï 1/lock", b'{"token": "of another, and longer than before"}' + b" " * 5000)
        held.renew()
        assert held.lost
    assert bucket.read("ünï 1/lock").startswith(b'{"token": "of another')


def _nobody_answers():
    import gcsfs

    nobody = gcsfs.GCSFileSystem(token="anon", endpoint_url="http://127.0.0.1:1")
    with pytest.raises(TimeoutError, match=r"within 3 s; tried \d+ times, last error: Cannot conn"):
        files.answer("gs://bkt/x", lambda: nobody.info("bkt/x"), seconds=3)


def test_all_kinds_of_files_in_a_bucket(bucket, port):
    finished(start([], code=f"import test_gcs; test_gcs.use_files({port})"))
    names = bucket.names("ünï 1/")
    (events,) = (name for name in names if name.startswith("events.out.tfevents."))
    assert bucket.read(f"ünï 1/{events}").count(b"loss") == 6
    lines = bucket.read("ünï 1/metrics.jsonl").decode().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": k, "loss": 1 / k} for k in range(1, 7)]
    assert bucket.read("ünï 1/samples/black.png").startswith(b"\x89PNG")
    pieces = {f"x.parts/{k:08d}_{n}.npz" for k, n in ((0, 3), (3, 3), (6, 3), (9, 1))}
    assert pieces <= names
    assert not [name for name in names if name.endswith(".tmp")]


def run_of(workdir, **overrides):
    """The program, with less patience for the lock of a process that was killed."""
    code = "import sys; from ddpm_jax import lock, main; "
    code += "lock.hold.__wrapped__.__kwdefaults__['patience'] = 2; sys.exit(main.main())"
    return start(arguments(workdir, **overrides), code=code)


def numbers(text):
    """The lines of metrics.jsonl, without what the clock says."""
    records = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith(CLOCKS)} for record in records]


@pytest.mark.long
def test_a_run_in_a_bucket_is_killed_and_goes_on_to_the_bit(bucket, tmp_path):
    first = run_of("gs://bkt/run ü", train__steps=100_000)
    deadline = time.monotonic() + 120
    while not any("checkpoints/10/commit_success" in name for name in bucket.names("run ü/")):
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.kill()
    _, errors = first.communicate()
    names = bucket.names("run ü/")
    assert "lock" in names, errors
    reached = max(
        int(name.split("/")[1])
        for name in names
        if name.startswith("checkpoints/") and name.endswith("/commit_success.txt")
    )
    lines = bucket.read("run ü/metrics.jsonl").decode()
    assert {record["step"] for record in numbers(lines)} >= set(range(5, reached + 1, 5))
    steps = reached + 10
    said = finished(run_of("gs://bkt/run ü", train__steps=steps))
    assert f"going on from step {reached}" in said and "taken over" in said
    assert train(tmp_path, train__steps=steps) == 0
    here = (tmp_path / "metrics.jsonl").read_text()
    assert numbers(bucket.read("run ü/metrics.jsonl").decode()) == numbers(here)
    finished(start(["--workdir=gs://bkt/run ü", "--mode=sample"]))
    assert main([f"--workdir={tmp_path}", "--mode=sample"]) == 0
    names = bucket.names("run ü/")
    assert {f"samples/step_{steps:08d}.png", "figures/training.png"} <= names
    assert "lock" not in names
    (drawn,) = (name for name in names if name.endswith("_4.npz"))
    (tmp_path / "theirs.npz").write_bytes(bucket.read(f"run ü/{drawn}"))
    ours, theirs = np.load(tmp_path / drawn), np.load(tmp_path / "theirs.npz")
    np.testing.assert_array_equal(ours["images"], theirs["images"])
    assert str(ours["protocol"]) == str(theirs["protocol"])  # Of the same parameters, by CRC-32.


@pytest.mark.long
def test_a_bucket_that_goes_away_in_mid_run_is_an_error_in_time(monkeypatch):
    """Whatever the libraries below would go on trying for; and whatever is to be closed."""
    server, port = serve()
    for name, value in gcs.environment(port).items():
        monkeypatch.setenv(name, value)
    bucket = Bucket(port)
    run = start(arguments("gs://bkt/run", train__steps=100_000, train__checkpoint_every=20))
    deadline = time.monotonic() + 120
    while not any("checkpoints/20/commit_success" in name for name in bucket.names("run/")):
        assert time.monotonic() < deadline and run.poll() is None, run.communicate()
        time.sleep(0.05)
    server.kill()
    began = time.monotonic()
    output, errors = run.communicate(timeout=300)
    assert time.monotonic() - began < 40, errors
    assert run.returncode == 1, output
    (error,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert re.search(
        r"gs://bkt/run.* no answer within 20 s; tried [3-9] times, last error: ", error
    )
    server.communicate()


@pytest.mark.long
def test_what_nobody_waits_for_is_not_written_later(bucket):
    """It would come over what was written since."""
    finished(start([], code="import test_gcs; test_gcs.give_up()"))


def give_up():
    """Writes to nobody, who comes when it is too late; in another process."""
    import fsspec
    import gcsfs

    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{late.getsockname()[1]}"
        nobody = gcsfs.GCSFileSystem(token="anon", endpoint_url=address)
        fsspec.filesystem = lambda *names, **settings: nobody
        files.ANSWER_SECONDS = 5.0
        with pytest.raises(TimeoutError, match=r"within 5 s; tried \d times, last error: Cannot"):
            files.replace(epath.Path("gs://bkt/x"), b"x")
        time.sleep(1.5)
        late.listen()
        late.settimeout(15)  # Left alone it tries after about 1.5, 4, 8.5, 17 seconds.
        with pytest.raises(TimeoutError):
            late.accept()
