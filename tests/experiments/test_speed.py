"""The measuring of speed: what is counted, who is compared with whom, and if it is one work."""

import json
import math
import pathlib
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.training import check
from ddpm_jax.training.job import make_job
from experiments import speed
from experiments.speeding import accelerators, contest, curves, page, workloads
from experiments.speeding.contest import DifferentWorkError, Result
from experiments.speeding.ours import Ours
from experiments.speeding.server import Worker, WorkerError
from experiments.speeding.workloads import Workload, matmul_flops

ECHO = """
import sys
from experiments.speeding.server import serve

def stop():
    print("nothing that anybody asked for")  # No answer: libraries print what they like.
    raise SystemExit("broken off")

serve({"add": lambda a, b: a + b, "noise": lambda: print("noise"), "stop": stop})
"""


@pytest.fixture
def echo(tmp_path, monkeypatch):
    (tmp_path / "echo.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{pathlib.Path(__file__).parents[2]}")
    worker = Worker("echo", [], {})
    yield worker
    worker.close()


def test_a_worker_answers_and_is_still_when_it_is_not_asked(echo):
    assert echo.ask("add", a=1, b=2) == 3
    state = pathlib.Path(f"/proc/{echo._process.pid}/stat")
    limit = time.monotonic() + 60
    while state.read_text().split()[2] != "T" and time.monotonic() < limit:  # Stopped.
        time.sleep(0.01)
    assert state.read_text().split()[2] == "T"
    assert echo.ask("noise") is None
    assert echo.ask("add", a="x", b="y") == "xy"
    with pytest.raises(WorkerError, match="broken off"):
        echo.ask("stop")


def test_flops_of_convolutions_and_products_by_hand():
    def function(x, kernel, a):
        y = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y.sum() + jax.jit(lambda a: jnp.sin(a @ a.T))(a).sum()

    shapes = (2, 8, 8, 3), (3, 3, 3, 5), (4, 6)
    found = matmul_flops(function, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    assert found == 2 * (2 * 4 * 4 * 5 * 3 * 3 * 3) + 2 * (4 * 4 * 6)


@pytest.mark.parametrize(("network", "gflops"), [("cifar10", 12.444), ("small", 0.843)])
def test_a_pass_through_the_paper_s_network_costs_what_it_does_by_hand(network, gflops):
    """The figures were counted layer by layer, apart from this code."""
    job = make_job(Workload(network, 2).config)
    assert workloads.network_flops(job) / 2e9 == pytest.approx(gflops, abs=6e-4)


def test_an_axis_of_seconds_spans_a_decade_at_least():
    low, high = curves.span([0.07, 0.08, 0.075])
    assert high / low == pytest.approx(10)
    assert low * high == pytest.approx(0.07 * 0.08)
    assert curves.span([1.0, 100.0, 7.0]) == pytest.approx((1 / 1.2, 120))


def test_a_workload_comes_through_a_command_line():
    one = Workload("digits", 16, 32, "bfloat16", (("model.channels", "8"),))
    again = Workload.from_json(one.to_json())
    assert again == one
    config = again.config
    assert (config.train.batch_size, config.sample.batch_size) == (16, 32)
    assert (config.model.dtype, config.model.channels) == ("bfloat16", 8)


def test_accelerators_draw_256_samples_of_the_paper_s_network():
    on_cpus, on_accelerators = (Workload.of("cifar10", there) for there in (False, True))
    assert (on_cpus.batch, on_cpus.samples) == (8, 8)
    assert (on_accelerators.batch, on_accelerators.samples) == (128, 256)


def test_samples_are_as_many_as_the_workload_says():
    workload = Workload("digits", 2, 6, overrides=(("model.channels", "8"),))
    ours = Ours(workload)
    flops = ours.flops()
    assert flops["sample"] == flops["train"] == 3 * workloads.network_flops(ours.job)
    assert contest.specification(workload)["samples"] == 6
    drawn = []
    ours._samplers[1] = lambda params, indices: drawn.append(len(indices))
    ours.sample(1)
    assert drawn == [6]


def result(name, loss, parameters=10, platform="cpu"):
    about = {"parameters": parameters, "platform": platform, "devices": "x", "versions": {"y": 1}}
    return Result(name, about, loss, cold=9.0, warm=3.0, memory=2**30)


def test_other_work_is_no_contest():
    ours = result("ours", 1.0)
    contest.check_equal_work([ours, result("diffusers", 1.00005), result("lucidrains", None, 7)])
    contest.check_equal_work([ours, result("diffusers+bf16", 1.01)])
    for other in (result("diffusers", 1.001), result("diffusers", float("nan"))):
        with pytest.raises(DifferentWorkError, match="at equal weights and inputs the loss of"):
            contest.check_equal_work([ours, other])
    with pytest.raises(DifferentWorkError, match="diffusers has 11 parameters, ours 10"):
        contest.check_equal_work([ours, result("diffusers", 1.0, 11)])
    with pytest.raises(DifferentWorkError, match="lucidrains runs on a gpu, ours on a cpu"):
        contest.check_equal_work([ours, result("lucidrains", None, 7, "gpu")])


class FakeWorker:
    """Takes as long as it is told, and notes who was asked when."""

    def __init__(self, name, seconds, asked):
        self.name, self.seconds, self.asked = name, seconds, asked

    def ask(self, what, **arguments):
        self.asked.append((self.name, what, arguments.get("steps")))
        return {"train": self.seconds, "sample": 2 * self.seconds, "memory": 5, "matrix": 1e9}.get(
            what, 1.0
        )


def test_contestants_take_turns_in_another_order_each_round():
    asked, names = [], ("ours", "one", "two")
    workers = {name: FakeWorker(name, i + 1.0, asked) for i, name in enumerate(names)}
    results = {name: result(name, 1.0) for name in names}
    contest._rounds("train", Workload("digits", 64), workers, results, 3, lambda line: None)
    trained = [(name, n) for name, what, n in asked if what == "train"][3:]
    assert [n for _, n in trained[::2]] == [1] * 9  # Nobody is timed when just awake.
    turns = [name for name, _ in trained[1::2]]
    assert turns == ["ours", "one", "two", "one", "two", "ours", "two", "ours", "one"]
    steps = dict(trained[1::2])
    assert steps == {"ours": 5, "one": 2, "two": 2}  # As many as take about equally long.
    assert results["two"].train == [3.0] * 3
    assert contest.ratio(results["ours"].train, results["two"].train) == pytest.approx([1 / 3] * 3)


def test_ratios_are_those_of_a_round():
    assert contest.ratio([1.0, 4.0, 9.0], [2.0, 2.0, 2.0]) == (2.0, 0.5, 4.5)


def test_a_step_on_paper():
    """Compute-bound, then memory-bound; with the ring's two passes of what each chip holds."""
    on = accelerators.Slice("made", 4, 100e12, 1e12, 50e9)
    ring = 2 * 3 / 4 * 1e9 / 50e9
    assert accelerators.step_seconds(8e12, 1e9, 1e9, on, 0.5) == pytest.approx(0.04 + ring)
    assert accelerators.step_seconds(8e9, 8e12, 1e9, on, 0.5) == pytest.approx(2.0 + ring)


def test_the_work_of_a_step_is_that_of_all_platforms():
    """Convolutions as they are written, not in CPUs' form with fewer multiplications."""
    config = config_lib.load_file("configs/digits.py")
    config.model.update(num_res_blocks=1, channel_multipliers=(1,))
    job = make_job(config, jax.devices()[:1])
    by_hand = 3 * workloads.network_flops(job)
    # XLA leaves out what meets padding: a sixth on maps of 8 × 8.
    for flops in (accelerators.step_cost(job)["flops"], check.step_flops(job)):
        assert 0.8 * by_hand < flops < by_hand


def test_results_name_the_machine_and_what_is_set_there(monkeypatch):
    for name in speed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = speed.hardware()
    assert found["environment"] == {"OMP_NUM_THREADS": "3"}
    (total,) = re.findall(r"MemTotal: +(\d+) kB", pathlib.Path("/proc/meminfo").read_text())
    assert found["memory"] == 1024 * int(total)


def test_the_tables_name_what_was_measured():
    one, other = result("ours", 1.0), result("diffusers", 1.0)
    for each, seconds in ((one, 0.5), (other, 1.0)):
        each.train, each.sample, each.evaluate = [seconds] * 3, [seconds] * 3, [seconds] * 3
        each.matrix = [100e9] * 3
    found = {
        "hardware": {
            "processor": "a CPU",
            "cores": 2,
            "memory": 8 * 2**30,
            "python": "3.11",
            "environment": {"OMP_NUM_THREADS": "2"},
            "commit": "abc",
        },
        "networks": {
            "digits": {
                "batch": 64,
                "samples": 256,
                "flops": {"train": 30e9, "train_xla": 25e9, "sample": 10e9},
                "contestants": [vars(one), vars(other)],
            }
        },
        "start": {"digits": {"cold": 20.0, "warm": 4.0}},
        "input": {"digits": {"batch": 64, "where": "on the device", "waiting": 0.004}},
        "curves": {
            "network": "digits",
            "points": {"T": [{"at": t, "seconds": t / 100, "nbytes": 2**29} for t in (100, 300)]},
        },
    }
    text = page.tables(json.loads(json.dumps(found)))
    assert text.startswith("a CPU, 2 cores, 8 GiB, Python 3.11, OMP_NUM_THREADS=2; commit abc\n")
    (row,) = [line for line in text.splitlines() if line.startswith("| diffusers")]
    assert "30.00 GFLOP by hand (25.00 as XLA counts)" in text and "step of 256, 10.00" in text
    assert "| 1 (1–1) | 0.50 (0.50–0.50) |" in row and "30.0 (30% of 100)" in row
    assert "| digits | 20.0 | 4.0 |" in text and "| digits | 64 | on the device | 0.40% |" in text
    assert "| T | 300 | 3 s a chain | 3.00 | 0.50 |" in text
    found["networks"]["digits"]["flops"]["train_xla"] = math.nan
    assert "(no CPU to count FLOPs on)" in page.tables(json.loads(json.dumps(found)))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--only=train,speeed", "--only=speeed: choose from train, sample, chain, start"),
        ("--networks=imagenet", "--networks=imagenet: choose from digits, small, cifar10"),
        ("--rounds=0", "--rounds=0: at least 1"),
        ("--contestants=diffusers", "--contestants: ours goes first"),
        ("--contestants=ours,diffusers,diffusers", "--contestants: each must be named once"),
        ("--contestants=ours,difusers", "--contestants=difusers: choose from ours, ours+bf16"),
        ("--contestants=ours+compile", "--contestants=ours+compile: choose from"),
        ("--contestants=ours,diffusers+fp8", "--contestants=diffusers+fp8: choose from"),
    ],
)
def test_bad_requests_are_one_line(flag, message, capsys, monkeypatch):
    monkeypatch.setattr(speed, "default_backend", lambda: "cpu")
    assert speed.main([flag]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_was_measured_before_a_contestant_ended_is_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "default_backend", lambda: "cpu")
    one = result("ours", 1.0)
    one.train, one.matrix = [0.5], [1e9]
    flops = {"train": 1e9, "train_xla": 1e9, "sample": 1e9}

    def compete(workload, *rest):
        yield [one], flops
        if workload.network == "small":
            raise WorkerError("out of memory")

    monkeypatch.setattr(contest, "compete", compete)
    flags = ["--only=train", "--networks=digits,small,cifar10", f"--out={tmp_path}"]
    assert speed.main(flags) == 1
    error = capsys.readouterr().err
    assert error == f"error: out of memory; what was measured before is in {tmp_path}\n"
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [*found["networks"]] == ["digits", "small"]
    assert found["networks"]["small"]["contestants"][0]["train"] == [0.5]
    assert "**small**" in (tmp_path / "speed.md").read_text()


class Ending:
    """A contestant that can train and ends when it is to sample."""

    def __init__(self):
        self.closed = False

    def ask(self, name, **_):
        if name == "sample":
            raise WorkerError("out of memory")
        return {} if name == "flops" else 1.0

    def close(self):
        self.closed = True


def test_a_contest_says_what_it_has_after_each_part_and_leaves_nobody_running(monkeypatch):
    workers = []

    def started(name, workload, place):
        workers.append(Ending())
        return workers[-1], result(name, 1.0)

    monkeypatch.setattr(contest, "_started", started)
    asked = Workload("digits", 2), ["ours"], ["train", "sample"], 2, print
    parts = contest.compete(*asked)
    (ours,), _ = next(parts)
    assert ours.train == [1.0, 1.0] and not ours.sample
    with pytest.raises(WorkerError, match="out of memory"):
        next(parts)
    parts = contest.compete(*asked)
    next(parts)
    parts.close()
    assert [worker.closed for worker in workers] == [True, True]


@pytest.mark.long
def test_a_whole_contest(tmp_path):
    """With diffusers: the same parameters, and the same loss at the same weights."""
    pytest.importorskip("diffusers")
    command = [sys.executable, "-m", "experiments.speed", "--only=train,sample", "--rounds=1"]
    command += ["--networks=digits", "--contestants=ours,diffusers", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "speed.json").read_text())
    ours, theirs = found["networks"]["digits"]["contestants"]
    assert ours["about"]["parameters"] == theirs["about"]["parameters"] == 701_345
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert np.isfinite([ours["cold"], ours["warm"], *ours["train"], *theirs["sample"]]).all()
