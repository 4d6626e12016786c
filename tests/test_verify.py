"""--mode=verify: it finds what is damaged and what differs, both made here, and writes nothing."""

import re
import shutil
import subprocess
import sys

import pytest
from runs_for_tests import ROOT, start, train

from ddpm_jax import runs
from ddpm_jax.main import main
from ddpm_jax.training import verify
from ddpm_jax.training.job import make_job

TRAINED = {"train__steps": 10, "train__checkpoint_every": 5}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A sound run with two checkpoints."""
    workdir = tmp_path_factory.mktemp("verify") / "run"
    assert train(workdir, **TRAINED) == 0
    return workdir


@pytest.fixture
def here(monkeypatch):
    """As the program's own process: JAX is awake already, with the devices that it has."""
    monkeypatch.setattr(verify, "use_several_cpu_devices", lambda environment: False)


def found(workdir):
    """What the directory holds, to the byte, and when it was written."""
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in workdir.rglob("*")
    }


def verified(workdir, capsys):
    """The exit code and the lines; nothing was written."""
    before = found(workdir)
    capsys.readouterr()
    code = main([f"--workdir={workdir}", "--mode=verify"])
    assert found(workdir) == before
    return code, capsys.readouterr().out.splitlines()


def numbers_only(workdir):
    """Whether the numbers are kept, and the lines, whatever the checkpoints are."""
    said = []
    config = runs.RunDirectory.of(workdir).load_config()
    return verify.verify(config, str(workdir), said.append), said


def test_a_sound_run_is_said_to_be_well(run, here, capsys, monkeypatch):
    monkeypatch.setattr(verify, "_others", lambda job: [])
    code, lines = verified(run, capsys)
    assert code == 0, lines
    assert re.fullmatch(r"checkpoints/10: whole \(\d+ leaves, 0\.2 MiB, \d+\.\d s\)", lines[0])
    assert lines[1].startswith("checkpoints/5: whole (")
    assert lines[2:5] == [
        "2 checkpoints, 0 damaged",
        "steps 10 to 18, trained twice: equal to the bit",
        "the same, saved and restored at 14: equal to the bit",
    ]
    assert lines[5:] == ["all is well"]


def test_a_run_is_compared_with_other_layouts_than_its_own(run):
    config = runs.RunDirectory.of(run).load_config()
    assert config.parallel.microbatches == 0
    titles = [title for title, _ in verify._others(make_job(config))]
    assert titles == ["jit on 1 cpu in 2 microbatches", "fsdp on 1 cpu", "pmap on 1 cpu"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads.
def test_a_flipped_byte_is_found(run, here, tmp_path, monkeypatch, capsys):
    """In whichever of the checkpoints it is."""
    monkeypatch.setattr(verify, "_check_numbers", lambda *_: True)
    for step in (5, 10):
        workdir = shutil.copytree(run, tmp_path / str(step))
        data = [path for path in (workdir / f"checkpoints/{step}/state").rglob("d/*")]
        # All of any size: which of them hold older versions of a node depends on Orbax's threads.
        for path in [path for path in data if path.stat().st_size > 5000]:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        code, lines = verified(workdir, capsys)
        assert code == 1
        (damaged,) = [line for line in lines if "DAMAGED" in line]
        assert damaged.startswith(f"checkpoints/{step}: DAMAGED: ")
        assert "2 checkpoints, 1 damaged" in lines and lines[-1] == "NOT all is well: see above"


def test_without_a_whole_checkpoint_the_numbers_are_checked_from_the_start(
    run, here, tmp_path, capsys, monkeypatch
):
    workdir = shutil.copytree(run, tmp_path / "run")
    for path in (workdir / "checkpoints").glob("*/meta/metadata"):
        path.write_text("{}")
    first = []
    monkeypatch.setattr(
        verify, "_check_numbers", lambda job, source, state, say: first.append(state) or True
    )
    code, lines = verified(workdir, capsys)
    assert code == 1 and int(first[0].step) == 0
    assert "there is no checkpoint to begin from: the steps are trained from the start" in lines


def test_no_run_is_one_line(here, tmp_path, capsys):
    assert main([f"--workdir={tmp_path}/none", "--mode=verify"]) == 2
    error = capsys.readouterr().err
    assert "no run there" in error and error.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_images_that_depend_on_more_than_the_step_are_found(run, monkeypatch):
    """A loader that begins anew wherever it is asked to go on: right, but for resuming."""
    before = verify.Batches

    class Anew(before):
        first = None

        def __call__(self, step):
            self.first = step if self.first is None else self.first
            return super().__call__(step - self.first)

    monkeypatch.setattr(verify, "Batches", Anew)
    monkeypatch.setattr(verify, "_others", lambda job: [])
    sound, lines = numbers_only(run)
    assert not sound
    assert "steps 10 to 18, trained twice: equal to the bit" in lines
    assert any(re.match("the same, saved and restored at 14: DIFFERS in ", line) for line in lines)


def test_what_is_not_deterministic_is_found(run, monkeypatch):
    """A step that draws from the clock, say."""
    before, made = verify._trainer, iter(range(100))

    def trainer(job, source):
        train = before(job, source)

        def restless(state, *rest):
            state = train(state, *rest)
            kernel = state.params["conv_in"]["kernel"]
            state.params["conv_in"]["kernel"] = kernel + 1e-7 * next(made)
            return state

        return restless

    monkeypatch.setattr(verify, "_trainer", trainer)
    monkeypatch.setattr(verify, "_others", lambda job: [])
    sound, lines = numbers_only(run)
    assert not sound
    assert "steps 10 to 18, trained twice: DIFFERS in params/conv_in/kernel" in lines


WITHOUT_MEAN = """
import sys
import jax
from ddpm_jax.main import main

jax.lax.pmean = lambda x, axis_name: x  # Which pmap alone needs.
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_every_layout_is_compared_and_a_forgotten_mean_found(run):
    """On two devices, of which pmap's go by their own gradients."""
    process = start([f"--workdir={run}", "--mode=verify"], devices=2, code=WITHOUT_MEAN)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    for title in ("jit on 1 cpu", "jit on 2 cpu in 2 microbatches", "fsdp on 2 cpu"):
        assert re.search(rf"^{title}: the same, at most [0-9.]+ times ", out, re.MULTILINE), out
    times = re.search(r"^pmap on 2 cpu: DIFFERS, at most ([0-9.e+]+) times", out, re.MULTILINE)
    assert times and float(times[1]) > 100, out
    assert out.count("DIFFERS") == 1 and out.endswith("NOT all is well: see above\n")


@pytest.mark.long
def test_where_cpus_are_virtual_the_run_s_own_layout_is_that_of_one(tmp_path, monkeypatch):
    """A batch of six divides over no four devices; and it is the run's own program that resumes."""
    assert train(tmp_path, **TRAINED, train__batch_size=6) == 0
    monkeypatch.delenv("XLA_FLAGS")
    command = [sys.executable, "-m", "ddpm_jax.main", "--mode=verify", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal to the bit") == 2
    assert " on 4 " not in done.stdout
