"""Cells, plans, where programs run, and what a sweep leaves."""

import csv
import dataclasses
import fcntl
import io
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from runs_for_tests import ROOT, TINY

from ddpm_jax import config as config_lib
from ddpm_jax import main as main_lib
from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import manifest
from ddpm_jax.evaluation.manifest import Manifest, Measured
from ddpm_jax.runs import RunDirectory
from experiments import sweep as program
from experiments.sweeping import (
    Cell,
    Stage,
    Sweep,
    check,
    executors,
    plan,
    product,
    slurm,
    table,
    zipped,
)
from experiments.sweeping.cells import load_sweep

DIGITS = f"{ROOT}/configs/digits.py"
EPS = {"diffusion.prediction": "eps"}


def make(tmp_path, cells, seeds=(0,), overrides=(), stages=None, **more):
    stages = stages or (Stage("train"), Stage("evaluate"))
    one = Sweep("T", DIGITS, {"all": cells}, stages=stages, **more)
    return plan.make_plan(one, RunDirectory.of(tmp_path).path, seeds, overrides)


def sweep_file(tmp_path, body):
    file = tmp_path / "mine.py"
    file.write_text("from experiments.sweeping import *\ndef get_sweep(variant=''):\n    " + body)
    return str(file)


# Cells.


def test_products_and_zips():
    axes = {"diffusion.prediction": ("eps", "v"), "train.batch_size": (8, 16)}
    assert [tuple(c.overrides.values()) for c in product(axes)] == [
        ("eps", 8),
        ("eps", 16),
        ("v", 8),
        ("v", 16),
    ]
    assert [tuple(c.overrides.values()) for c in zipped(axes)] == [("eps", 8), ("v", 16)]
    assert [c.name for c in zipped(axes)] == ["eps-batch_size=8", "v-batch_size=16"]
    with pytest.raises(RequestError, match=r"prediction 2, train\.batch_size 1"):
        zipped(axes | {"train.batch_size": (8,)})


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({}, "base"),
        ({"model.channel_multipliers": (1, 2)}, "channel_multipliers=1,2"),
        ({"data.data_dir": "a/b c"}, "data_dir=a_b_c"),
        ({"train.learning_rate": 1e-4, "train.objective": "vlb"}, "learning_rate=0.0001-vlb"),
    ],
)
def test_names_are_one_folder(overrides, name):
    assert Cell(overrides).name == name


@pytest.mark.parametrize("name", ["a/b", "..", "a b"])
def test_names_that_are_no_folder_are_refused(name):
    with pytest.raises(RequestError, match="a name is letters"):
        Cell({}, name=name)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", "returns no Sweep"),
        ("return 1 / 0", "fails: ZeroDivisionError: division by zero"),
        ("return Sweep('T', 'configs/digits.py', {})", "the sweep has no cells"),
        ("return Sweep('T', 'c', {'g': [Cell({}), Cell({})]})", "two of the name base"),
        ("return Sweep('T', 'c', {'g': [Cell({})]}, stages=())", "first stage must be"),
        ("return Sweep('T', 'c', {'g': [Cell({})]}, stages=[Stage('trian')])", "train, evaluate"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, body, message):
    with pytest.raises(RequestError, match=message) as caught:
        load_sweep(sweep_file(tmp_path, body))
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_those_there(tmp_path):
    with pytest.raises(RequestError, match=r"there are .*table1\.py.*table2\.py"):
        load_sweep(f"{ROOT}/experiments/sweeps/table3.py")


@pytest.mark.parametrize("table_name", ["table1", "table2"])
@pytest.mark.parametrize("variant", ["", "digits", "cifar10", "small"])
def test_the_papers_sweeps_are_valid(tmp_path, table_name, variant):
    found = load_sweep(f"{ROOT}/experiments/sweeps/{table_name}.py:{variant}")
    found = dataclasses.replace(found, config=f"{ROOT}/{found.config}")
    planned = plan.make_plan(found, tmp_path, [0, 1, 2])
    assert len(planned.runs) == 3 * (2 if table_name == "table1" else 11)
    for run in planned.runs:
        config = run.config(run.stages[1])
        choices = [config_lib.get(config, key) for key in config_lib.VARIANT_KEYS]
        assert sorted(run.cell.name.split("-")) == sorted(choices)
        if variant == "cifar10":  # The paper's network, steps and numbers.
            assert (config.model.channels, config.train.steps) == (128, 800_000)
            assert {"fid", "is"} < {*config.evaluation.metrics}


def test_table_2_stands_as_in_the_paper():
    found = load_sweep(f"{ROOT}/experiments/sweeps/table2.py")
    paper = {cell.name: dict(cell.paper) for cell in found.groups["the paper's six"]}
    # Ho et al. 2020, Table 2.
    assert paper == {
        "mu-vlb-learned": {"IS": "7.28 ± 0.10", "FID": "23.69"},
        "mu-vlb-fixed_large": {"IS": "8.06 ± 0.09", "FID": "13.22"},
        "mu-simple-fixed_large": {"IS": "–", "FID": "–"},
        "eps-vlb-learned": {"IS": "–", "FID": "–"},
        "eps-vlb-fixed_large": {"IS": "7.67 ± 0.13", "FID": "13.51"},
        "eps-simple-fixed_large": {"IS": "9.46 ± 0.11", "FID": "3.17"},
    }


# Plans.


@pytest.mark.parametrize(
    ("cells", "overrides", "message"),
    [
        ([Cell({"train.stepz": 1})], (), "cell stepz=1: .*did you mean train.steps"),
        ([Cell({"diffusion.variance": "learned"})], (), "cell learned: .*never train"),
        ([Cell(EPS)], [("diffusion.prediction", "v")], "cell eps sets that itself"),
        ([Cell({"seed": 3})], (), "the seed is set by --seeds"),
    ],
)
def test_a_bad_cell_is_named(tmp_path, cells, overrides, message):
    with pytest.raises(RequestError, match=message):
        make(tmp_path, [Cell({"train.batch_size": 32}), *cells], overrides=overrides)
    assert not list(tmp_path.iterdir())


def test_a_directory_with_a_run_of_another_config_is_refused(tmp_path):
    run = make(tmp_path, [Cell(EPS)]).runs[0]
    RunDirectory.of(run.path).save_config(run.config(run.stages[0]))
    make(tmp_path, [Cell(EPS)], overrides=[("train.steps", "5200"), ("sample.count", "7")])
    with pytest.raises(RequestError, match=r"train.batch_size was 64, is 32"):
        make(tmp_path, [Cell(EPS)], overrides=[("train.batch_size", "32")])


def test_the_commands_mean_the_cells_configs(tmp_path):
    cell = Cell(
        {
            "model.attention_resolutions": (),
            "model.channel_multipliers": (1, 2, 2),
            "evaluation.metrics": ("bits_per_dim", "fd_pixels"),
            "train.learning_rate": 3e-5,
            "sample.clip": False,
        }
    )
    stages = Stage("train"), Stage("sample", {"sample.count": 9})
    run = make(tmp_path, [cell], seeds=[5], stages=stages).runs[0]
    for stage in stages:
        argv = run.argv(stage)
        assert argv[1:3] == ["-m", "ddpm_jax.main"]
        args, overrides = main_lib.parse(argv[3:])
        assert main_lib.resolve(args, overrides) == run.config(stage)
        assert (args.mode, args.workdir) == (stage.mode, str(tmp_path / cell.name / "seed5"))
    assert run.config(stages[1]).sample.count == 9
    assert run.config(stages[1]).seed == 5


def finish(run, stage, status=plan.DONE, message=""):
    if stage.mode == "train" and status == plan.DONE:
        steps = run.config(stage).train.steps
        (run.path / "checkpoints" / str(steps)).mkdir(parents=True, exist_ok=True)
    run.path.mkdir(parents=True, exist_ok=True)
    run.write(stage, status, message, 2.0)


def keep_results(run, step=2600, value=1.0):
    """The results that the stage of evaluation asks for, by hand."""
    for name, asked in run.asked(run.stages[1]).items():
        estimator = asked.estimator | ({"seed": run.seed} if "seed" in asked.estimator else {})
        better = asked.kind.better
        number = Measured(
            value, 0.02, "bits/dim", better, asked.protocol, estimator, {"outside": 0.25}
        )
        subject = {"checkpoint": step, "config": run.config(run.stages[0]).to_dict()}
        images = asked.protocol.get("images", "")
        path = RunDirectory.of(run.path).evaluation / f"step{step}_{name}_{images}.json"
        manifest.save(path, Manifest(name, number, subject, manifest.provenance(1)))


def test_only_what_is_missing_is_left(tmp_path):
    def left(**overrides):
        values = [(key.replace("__", "."), value) for key, value in overrides.items()]
        return [s.name for s in make(tmp_path, [Cell(EPS)], overrides=values).runs[0].missing()]

    run = make(tmp_path, [Cell(EPS)]).runs[0]
    train, evaluate = run.stages
    assert left() == ["train", "evaluate"]
    finish(run, train, plan.INTERRUPTED)
    assert left() == ["train", "evaluate"]
    finish(run, train)
    assert left() == ["evaluate"]
    finish(run, evaluate)
    assert left() == ["evaluate"] and run.outcome() == "evaluate missing"  # Without results.
    keep_results(run)
    assert left() == [] and run.outcome() == "done"
    assert json.loads(run.record.read_text())["train"]["seconds"] == 4.0
    # Evaluated otherwise, trained further, or without its checkpoint.
    assert left(evaluation__count="500") == ["evaluate"]
    assert left(train__steps="5200") == ["train", "evaluate"]
    assert left(train__log_every="10") == []  # The results are those asked for.
    (run.path / "checkpoints" / "2600").rmdir()
    assert left() == ["train"]


def test_a_second_evaluation_is_left_where_the_first_is_there(tmp_path):
    stages = (
        Stage("train"),
        Stage("evaluate"),
        Stage("evaluate", {"evaluation.ema": False}, "raw"),
    )
    run = make(tmp_path, [Cell(EPS)], stages=stages).runs[0]
    finish(run, run.stages[0])
    keep_results(run)
    finish(run, run.stages[1])
    assert [stage.name for stage in run.missing()] == ["raw"]
    assert run.complete(run.stages[1]) and not run.complete(run.stages[2])


def test_what_diverged_is_not_tried_again_and_what_failed_is(tmp_path):
    run = make(tmp_path, [Cell(EPS)]).runs[0]
    finish(run, run.stages[0], plan.FAILED, "no space")
    assert len(run.missing()) == 2 and run.outcome() == "failed: no space"
    finish(run, run.stages[0], plan.DIVERGED, "loss not finite")
    assert run.missing() == [] and run.outcome() == "diverged: loss not finite"
    assert plan.make_jobs(make(tmp_path, [Cell(EPS)]), together=False) == []


def test_seeds_together_are_one_command(tmp_path):
    planned = make(tmp_path, [Cell(EPS)], seeds=[0, 1, 2])
    finish(planned.runs[1], planned.runs[1].stages[0])
    (job,) = plan.make_jobs(planned, together=True)
    train, *evaluations = job.commands
    assert [run.seed for run in train.runs] == [0, 2]
    assert "--seeds=0,2" in train.argv
    assert f"--workdir={tmp_path}/eps/seed{{seed}}" in train.argv
    assert not any(word.startswith("--config.seed") for word in train.argv)
    assert [c.runs[0].seed for c in evaluations] == [0, 1, 2]
    alone = plan.make_jobs(planned, together=False)
    assert [len(job.commands) for job in alone] == [2, 1, 2]


# Where programs run.


@dataclasses.dataclass(frozen=True)
class Script(plan.Command):
    """A command whose program is a few lines of Python; run: the first run's path."""

    code: str = ""

    @property
    def argv(self):
        return [sys.executable, "-c", self.code, str(self.runs[0].path)]


DO = "import pathlib, sys; pathlib.Path(sys.argv[1], 'checkpoints', '2600').mkdir(parents=True)"


def scripts(planned, codes):
    return [
        plan.Job(run.label, [Script(run.stages[0], [run], code)])
        for run, code in zip(planned.runs, codes, strict=True)
    ]


def test_a_failing_job_does_not_stop_the_others(tmp_path):
    planned = make(tmp_path, [Cell(EPS)], seeds=range(4), stages=[Stage("train")])
    codes = [
        DO,
        "print('fine so far'); raise SystemExit('error: the disk is full')",
        "raise SystemExit('error: loss or gradient not finite at step 3')",
        DO + "; print('step 1')",
    ]
    said = []
    ended = executors.run_local(scripts(planned, codes), 2, said.append)
    label = [run.label for run in planned.runs]
    assert ended == {
        label[0]: ("done", ""),
        label[1]: ("failed", "the disk is full"),
        label[2]: ("diverged", "loss or gradient not finite at step 3"),
        label[3]: ("done", ""),
    }
    assert [run.outcome() for run in planned.runs][::3] == ["done", "done"]
    assert any("failed" in line and "the disk is full" in line for line in said)
    log = planned.runs[1].log.read_text()
    assert log.startswith("$ ") and "fine so far" in log


SAVES = (
    "import signal, sys, time\n"
    "def end(*_): print('stopped at step 7'); sys.exit(75)\n"
    "signal.signal(signal.SIGTERM, end)\n"
    "print('ready', flush=True)\n"
    "time.sleep(60)"
)


def test_a_signal_lets_every_program_save(tmp_path):
    planned = make(tmp_path, [Cell(EPS)], seeds=range(3), stages=[Stage("train")])
    logs = [run.log for run in planned.runs[:2]]

    def interrupt():
        while not all(log.exists() and "ready" in executors.last_line(log) for log in logs):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    ended = executors.run_local(scripts(planned, [SAVES] * 3), 2, lambda line: None)
    thread.join()
    assert [*ended.values()] == [("interrupted", "stopped at step 7")] * 2
    assert not planned.runs[2].path.exists()  # Never begun.
    assert planned.runs[0].missing() == [planned.runs[0].stages[0]]


def test_a_signal_before_the_program_can_listen(tmp_path):
    """It is killed by the signal, and the next stage does not start."""
    run = make(tmp_path, [Cell(EPS)]).runs[0]
    job = plan.Job(
        run.label, [Script(stage, [run], "import time; time.sleep(60)") for stage in run.stages]
    )
    asked = threading.Event()
    result = []
    thread = threading.Thread(
        target=lambda: result.append(executors.perform(job, stop=asked.is_set))
    )
    thread.start()
    while not run.log.exists():
        time.sleep(0.02)
    asked.set()
    thread.join()
    assert result[0][0] == "interrupted"
    assert run.missing() == [*run.stages]


def test_interrupted_after_the_last_checkpoint_is_not_done(tmp_path):
    """The last pictures are still to be drawn."""
    run = make(tmp_path, [Cell(EPS)]).runs[0]
    job = plan.Job(run.label, [Script(run.stages[0], [run], DO + "; sys.exit(75)")])
    assert executors.perform(job)[0] == "interrupted"
    assert run.missing() == [*run.stages]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; print('step 7'); os.kill(os.getpid(), 9)", "killed by SIGKILL after: "),
        ("pass", "no checkpoint of step 2600"),
    ],
)
def test_ends_that_explain_themselves(tmp_path, code, message):
    run = make(tmp_path, [Cell(EPS)]).runs[0]
    job = plan.Job(run.label, [Script(run.stages[0], [run], code)])
    status, told = executors.perform(job)
    assert status == "failed" and told.startswith(message)


def test_a_failed_training_is_not_evaluated(tmp_path):
    """What there is to evaluate is another step's."""
    run = make(tmp_path, [Cell(EPS)]).runs[0]
    codes = ["import os; print('step 7'); os.kill(os.getpid(), 9)", "print('bits_per_dim: 5.0')"]
    commands = [Script(*pair) for pair in zip(run.stages, [[run]] * 2, codes, strict=True)]
    assert executors.perform(plan.Job(run.label, commands)) == (
        "failed",
        "killed by SIGKILL after: step 7",
    )
    assert "bits_per_dim" not in run.log.read_text()
    assert run.missing() == [*run.stages]
    # Nor does an evaluation count that leaves no results.
    finish(run, run.stages[0])
    ended = executors.perform(plan.Job(run.label, commands[1:]))
    assert ended == ("failed", "not all results of step 2600")


EVALUATES = (
    "import pathlib, sys; p = pathlib.Path(sys.argv[1]); (p / 'kept').rename(p / 'evaluation')"
)


def test_one_seeds_failing_evaluation_leaves_the_others(tmp_path):
    planned = make(tmp_path, [Cell(EPS)], seeds=range(3))
    for run in planned.runs:
        finish(run, run.stages[0])
        keep_results(run)
        (run.path / "evaluation").rename(run.path / "kept")
    codes = [EVALUATES, "raise SystemExit('error: full')", EVALUATES]
    commands = [
        Script(run.stages[1], [run], code) for run, code in zip(planned.runs, codes, strict=True)
    ]
    assert executors.perform(plan.Job("eps", commands)) == ("failed", "full")
    assert [run.outcome() for run in planned.runs] == ["done", "failed: full", "done"]


def test_a_second_sweep_in_the_same_directory_is_refused(tmp_path, capsys):
    file = sweep_file(tmp_path, f"return Sweep('T', {DIGITS!r}, {{'g': [Cell({{}})]}})")
    with (tmp_path / "sweep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert program.main([f"--sweep={file}", f"--workdir={tmp_path}"]) == 2
    assert "another sweep is at work there" in capsys.readouterr().err


def test_of_seeds_together_each_has_its_own_end(tmp_path):
    planned = make(tmp_path, [Cell(EPS)], seeds=range(3), stages=[Stage("train")])
    code = (
        f"import pathlib, sys; p = pathlib.Path({str(tmp_path)!r})\n"
        "(p/'eps'/f'seed0'/'checkpoints'/'2600').mkdir(parents=True)\n"
        "said = [f'seed {k}: loss or gradient not finite at step {k + 4}' for k in (1, 2)]\n"
        "print(*said, sep='\\n')\n"
        "sys.exit('error: ' + '; '.join(said))"
    )
    job = plan.Job("eps", [Script(planned.runs[0].stages[0], planned.runs, code)])
    assert executors.perform(job)[0] == "diverged"
    assert [run.outcome() for run in planned.runs] == [
        "done",
        "diverged: seed 1: loss or gradient not finite at step 5",
        "diverged: seed 2: loss or gradient not finite at step 6",
    ]
    first, *others = (run.log for run in planned.runs)
    assert all(log.read_text().endswith(f"seed 0, see {first}\n") for log in others)


def test_what_names_no_seed_is_no_seeds_divergence(tmp_path):
    planned = make(tmp_path, [Cell(EPS)], seeds=range(2), stages=[Stage("train")])
    code = "import sys; print('seed 0: step 7'); sys.exit('error: samples are not finite')"
    job = plan.Job("eps", [Script(planned.runs[0].stages[0], planned.runs, code)])
    assert executors.perform(job) == ("failed", "samples are not finite")
    assert all(run.missing() for run in planned.runs)


@pytest.mark.parametrize("mode", ["run", "check"])
def test_seeds_together_are_refused_in_another_mode_than_jit(tmp_path, capsys, mode):
    cells = "[Cell({}), Cell({'parallel.mode': 'fsdp'}, name='split')]"
    file = sweep_file(tmp_path, f"return Sweep('T', {DIGITS!r}, {{'g': {cells}}})")
    argv = [f"--sweep={file}", f"--workdir={tmp_path}/out", f"--mode={mode}", "--together"]
    assert program.main(argv) == 2
    error = capsys.readouterr().err
    assert "cell split: config.parallel.mode=fsdp" in error and "leave out --together" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_machine_is_shared_out(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    dealt = executors.shares(2)
    assert [env["CUDA_VISIBLE_DEVICES"] for env, _ in dealt] == ["2,5", "3"]
    with pytest.raises(RequestError, match="there are 3 GPUs"):
        executors.shares(4)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4, 6}, raising=False)
    assert [cores for _, cores in executors.shares(2)] == [[0, 4], [1, 6]]
    assert [cores for _, cores in executors.shares(1)] == [()]
    with pytest.raises(RequestError, match="--jobs=0: at least 1"):
        executors.shares(0)


def test_printed_commands_can_be_run_as_they_stand(tmp_path):
    planned = make(tmp_path, [Cell({"data.cache_dir": "a b;c"}, name="odd")])
    lines = []
    executors.print_commands(plan.make_jobs(planned, together=False), lines.append)
    (line,) = lines
    first, second = line.split(" && ")
    run = planned.runs[0]
    assert shlex.split(first) == ["python", *run.argv(run.stages[0])[1:]]
    assert shlex.split(second) == ["python", *run.argv(run.stages[1])[1:]]


def test_slurm_by_submitits_local_executor(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    here = pathlib.Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parent}:{ROOT}")  # `Refused` is unpickled.
    planned = make(tmp_path, [Cell(EPS)], seeds=range(2), stages=[Stage("train")])
    jobs = plan.make_jobs(planned, together=False)
    # Refused by the program itself, at once: what is tested is the way there and back.
    jobs = [plan.Job(job.label, [Refused(c.stage, c.runs) for c in job.commands]) for job in jobs]
    said = []
    options = {"cluster": "local", "timeout_min": 5}
    ended = slurm.run_slurm(jobs, tmp_path, options, said.append)
    assert {status for status, _ in ended.values()} == {"failed"}
    messages = [message for _, message in ended.values()]
    assert messages == ["unknown argument --nonsense; see --help"] * 2
    assert all(run.log.exists() for run in planned.runs)
    with pytest.raises(RequestError, match=r"submitit: .*no_such_option"):
        slurm.run_slurm(jobs, tmp_path, {"cluster": "local", "no_such_option": 1}, said.append)


class Refused(plan.Command):
    """A command with an argument that does not exist; importable, as another process needs it."""

    @property
    def argv(self):
        return [*super().argv, "--nonsense"]


def test_a_preempted_job_saves_and_is_submitted_again(tmp_path):
    submitit = pytest.importorskip("submitit")
    planned = make(tmp_path, [Cell(EPS)], stages=[Stage("train")])
    (job,) = scripts(planned, [SAVES])
    submitted = slurm.SlurmJob(job)
    result = []
    thread = threading.Thread(target=lambda: result.append(submitted()))
    thread.start()
    log = planned.runs[0].log
    while not (log.exists() and "ready" in executors.last_line(log)):
        time.sleep(0.05)
    again = submitted.checkpoint()
    thread.join()
    assert result == [("interrupted", "stopped at step 7")]
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function.job is job


# What it costs, and what it leaves.


def test_network_calls_are_those_of_evaluation(tmp_path):
    overrides = {
        "train.sample_every": 0,
        "evaluation.metrics": ("bits_per_dim", "fd_pixels"),
        "evaluation.count": 300,
        "evaluation.terms": 30,
        "evaluation.max_images": 1000,
        "sample.count": 10,
        "sample.steps": 50,
    }
    run = make(tmp_path, [Cell(overrides, name="a")]).runs[0]
    calls = check.network_calls(run, {"test": 256, "train": 1541})
    assert calls == 10 * 50 + (256 + 1000) * 30 + 300 * 50


@pytest.mark.slow
def test_a_sweep_is_checked_without_starting_it(tmp_path, capsys):
    flags = [f"--config.{key}={value}" for key, value in TINY.items()]
    cells = "product({'diffusion.prediction': ('eps', 'v')})"
    file = sweep_file(tmp_path, f"return Sweep('T', {DIGITS!r}, {{'g': {cells}}})")
    argv = [f"--sweep={file}", f"--workdir={tmp_path}/out", "--mode=check", "--seeds=2", *flags]
    assert program.main(argv) == 0
    out = capsys.readouterr().out
    assert "4 runs, all valid" in out and "eps: 10," in out
    assert not (tmp_path / "out").exists()


RNG = np.random.default_rng(0)
VALUES = RNG.normal(4, 0.1, (2, 3))


def measured(planned, skip=(), step=2600, values=VALUES):
    """Manifests of runs, by hand."""
    for i, cell in enumerate(planned.sweep.cells):
        for run in planned.of(cell):
            if run.label in skip:
                continue
            for stage in run.stages:
                finish(run, stage)
            keep_results(run, step, values[i, run.seed])


def test_the_table_is_means_and_deviations_over_seeds(tmp_path):
    cells = [
        Cell(EPS, paper={"FID": "3.17"}),
        Cell({"diffusion.prediction": "v"}),
        Cell({"diffusion.prediction": "x0"}, skip="in another sweep"),
    ]
    planned = make(tmp_path, cells, seeds=range(3))
    measured(planned)
    table.write(planned, "the command", lambda line: None)
    text = (tmp_path / "results.md").read_text()
    rows = [
        [entry.strip() for entry in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    head, by_cell = rows[0], {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert head[-1] == "paper: FID" and by_cell["eps"]["paper: FID"] == "3.17"
    for i, name in enumerate(("eps", "v")):
        mean, deviation = by_cell[name]["bits_per_dim_test"].split(" ± ")
        assert float(mean) == pytest.approx(VALUES[i].mean(), abs=0.006)
        assert float(deviation) == pytest.approx(VALUES[i].std(ddof=1), rel=0.05, abs=0.0006)
        assert by_cell[name]["outside"] == "0.25" and by_cell[name]["seeds"] == "3"
    assert "skipped: in another sweep" in text and "the command" in text
    assert "was not measured alike" not in text
    lines = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    found = [float(line["bits_per_dim_test"]) for line in lines]
    np.testing.assert_allclose(found, VALUES.ravel(), rtol=1e-5)
    assert {line["bits_per_dim_test_error"] for line in lines} == {"0.02"}
    assert {line["diffusion.prediction"] for line in lines} == {"eps", "v"}
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_tells_what_is_missing_or_unlike(tmp_path):
    other = Cell({"diffusion.prediction": "v", "evaluation.max_images": 128})
    planned = make(tmp_path, [Cell(EPS), other], seeds=range(3))
    with pytest.raises(RequestError, match="no run has results yet"):
        table.write(planned, "c", lambda line: None)
    assert not list(tmp_path.iterdir())
    measured(planned, skip=["v-max_images=128/seed1"])
    finish(planned.runs[4], planned.runs[4].stages[0], plan.DIVERGED, "not finite")
    table.write(planned, "c", lambda line: None)
    text = (tmp_path / "results.md").read_text()
    assert "| v-max_images=128 | 2 of 3 (diverged) |" in text
    assert "bits_per_dim_test was not measured alike: " in text and "images" in text


def test_results_of_other_settings_are_not_shown(tmp_path):
    """Of fewer images, of an earlier step, or damaged."""
    cells = [Cell(EPS, name="a"), Cell({"diffusion.prediction": "v"}, name="b")]
    bound = [("evaluation.metrics", "bits_per_dim")]
    few = make(tmp_path, cells, overrides=[*bound, ("evaluation.max_images", "100")])
    measured(few, values=VALUES + 1)
    planned = make(tmp_path, cells, overrides=bound)
    assert [run.results() for run in planned.runs] == [{}, {}]
    measured(planned)
    measured(planned, step=1300, values=VALUES + 2)
    (planned.runs[1].path / "evaluation" / "step2600_x.json").write_text("{")
    for k, run in enumerate(planned.runs):
        assert {float(m.measured) for m in run.results().values()} == {VALUES[k, 0]}
    assert float(few.runs[0].results()["bits_per_dim_test"].measured) == VALUES[0, 0] + 1


def test_what_printed_commands_have_done_counts(tmp_path):
    settings = {"evaluation.metrics": ("bits_per_dim",), "evaluation.split": ("test",)}
    planned = make(tmp_path, [Cell(EPS)], overrides=list(settings.items()))
    (run,) = planned.runs
    (run.path / "checkpoints" / "2600").mkdir(parents=True)
    assert [stage.name for stage in run.missing()] == ["evaluate"]
    keep_results(run)
    assert len(run.asked(run.stages[1])) == 5 and run.missing() == [] and run.outcome() == "done"


def test_a_run_that_went_further_is_refused(tmp_path):
    run = make(tmp_path, [Cell(EPS)]).runs[0]
    RunDirectory.of(run.path).save_config(run.config(run.stages[0]))
    (run.path / "checkpoints" / "5200").mkdir(parents=True)
    with pytest.raises(RequestError, match=r"trained for 5200 steps, more than train.steps=2600"):
        make(tmp_path, [Cell(EPS)])


def test_configs_are_those_of_the_planning(tmp_path):
    file = tmp_path / "mine.py"
    text = pathlib.Path(DIGITS).read_text()
    file.write_text(text)
    one = Sweep("T", str(file), {"all": [Cell(EPS)]})
    (run,) = plan.make_plan(one, tmp_path, [0]).runs
    before = run.key(run.stages[0])
    file.write_text(text.replace("batch_size=64", "batch_size=32"))
    assert run.key(run.stages[0]) == before
    assert run.config(run.stages[0]).train.batch_size == 64


def test_the_figure_has_every_seed_in_its_cells_row(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(table, "to_png", lambda f: figures.append(f) or b"")
    planned = make(tmp_path, [Cell(EPS), Cell({"diffusion.prediction": "v"})], seeds=range(3))
    measured(planned)
    table.write(planned, "c", lambda line: None)
    (whole,) = figures
    assert isinstance(whole, Figure)
    panel = next(axes for axes in whole.axes if axes.get_title() == "bits_per_dim_test")
    dots = {
        line.get_ydata()[0]: line.get_xdata() for line in panel.lines if len(line.get_xdata()) == 3
    }
    np.testing.assert_allclose([dots[0], dots[1]], VALUES, rtol=1e-12)
    assert [t.get_text() for t in whole.axes[0].get_yticklabels()] == ["eps", "v"]


def test_stability_is_read_from_training(tmp_path):
    run = make(tmp_path, [Cell(EPS)]).runs[0]
    run.path.mkdir(parents=True)
    records = [
        {"step": s, "grad_norm": g} for s, g in ((50, 9.0), (100, 8.0), (150, 3.0), (200, 4.0))
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    RunDirectory.of(run.path).metrics.write_text(text)
    assert table.stability(run) == {}  # Not at its end.
    finish(run, run.stages[0])
    assert table.stability(run) == {"diverged": 0, "grad_norm_max": 4.0}  # Warm-up: 100.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds=0"], "--seeds=0: how many"),
        (["--seeds=1,1"], "--seeds=1,1: how many"),
        (["--seeds=x"], "--seeds=x: how many"),
        (["--executor=pbs"], "invalid choice: 'pbs'"),
        (["--slurm.partition=x"], "belongs to --executor=slurm"),
        (["--executor=slurm", "--slurm.partition"], "write --slurm.OPTION=VALUE"),
        (["--config.train.stepz=1"], "did you mean train.steps"),
        (["--nonsense"], "unknown argument --nonsense"),
    ],
)
def test_a_bad_request_is_one_line(tmp_path, capsys, argv, message):
    file = sweep_file(tmp_path, f"return Sweep('T', {DIGITS!r}, {{'g': [Cell({{}})]}})")
    assert program.main([f"--sweep={file}", f"--workdir={tmp_path}/out", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_whole_sweep_and_the_same_command_again(tmp_path):
    settings = TINY | {
        "model.channel_multipliers": (1,),
        "model.attention_resolutions": (),
        "data.flip": False,
        "evaluation.metrics": ("bits_per_dim",),
        "evaluation.max_images": 16,
        "evaluation.split": ("test",),
    }
    cells = "[Cell({'diffusion.prediction': 'v'}), Cell({'train.clip_norm': 0.0, "
    cells += "'train.learning_rate': 1e12}, name='wild')]"
    file = sweep_file(tmp_path, f"return Sweep('T', {DIGITS!r}, {{'g': {cells}}}, {settings!r})")
    argv = [sys.executable, "-m", "experiments.sweep", f"--sweep={file}"]
    argv += [f"--workdir={tmp_path}/out", "--jobs=2"]

    def start():
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)

    first = start()
    assert first.returncode == 1, first.stderr
    assert "wild/seed0: diverged: loss or gradient not finite at step" in first.stderr
    rows = list(csv.DictReader((tmp_path / "out/results.csv").open()))
    assert [row["status"].partition(":")[0] for row in rows] == ["done", "diverged"]
    assert float(rows[0]["bits_per_dim_test"]) > 0
    logs = {path: path.read_bytes() for path in pathlib.Path(tmp_path).rglob("sweep.log")}
    assert len(logs) == 2
    second = start()
    assert second.returncode == 1, second.stderr  # One of its runs has diverged.
    assert "2 runs, 1 done, 1 diverged; 0 jobs to do" in second.stdout
    assert all(path.read_bytes() == before for path, before in logs.items())
