"""The command line: what is wrong is said in one line with exit code 2, and nothing is started."""

import re

import jax
import numpy as np
import pytest
from runs_for_tests import ROOT, arguments, start, train

from ddpm_jax.main import main
from ddpm_jax.training import check

DIGITS = f"--config={ROOT}/configs/digits.py"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config=FILE is needed"),
        ([DIGITS], "--workdir=DIR is needed"),
        ([DIGITS, "--workdir=W", "--mode=trian"], "invalid choice: 'trian'"),
        ([DIGITS, "--workdir=W", "--wrokdir=W"], "unknown argument --wrokdir=W"),
        ([DIGITS, "--workdir=W", "--config.train.stepz=1"], "did you mean train.steps?"),
        ([DIGITS, "--workdir=W", "--config.train.steps=x"], "train.steps=x: expected an integer"),
        ([DIGITS, "--workdir=W", "--config.train.steps"], "--config.train.steps needs a value"),
        ([DIGITS + ":mu,vbl", "--workdir=W"], "unknown variant 'vbl'; known: eps, mu"),
        ([DIGITS + ":learned", "--workdir=W"], "never train the variance"),
        (["--config=configs/digit.py", "--workdir=W"], "no file configs/digit.py; there are"),
        ([DIGITS, "--workdir=W", "--config.data.split=dev"], "splits train, test"),
        (
            [
                DIGITS,
                "--workdir=W",
                "--config.data.image_size=16",
                "--config.model.attention_resolutions=8",
            ],
            "set --config.data.image_size=8",
        ),
        ([DIGITS, "--workdir=W", "--config.train.batch_size=2000"], "only 1541 images"),
        ([DIGITS, "--workdir=W", "--mode=sample"], "no run there (no config.json)"),
        (["--workdir=W", "--mode=sample"], "no run there (no config.json)"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_code_2(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert not captured.out
    assert not (tmp_path / "W").exists()


@pytest.mark.parametrize("content", ["{", "[1]", '{"train": {"step": 1}}'])
def test_a_damaged_config_json_is_named(content, capsys, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert main([f"--workdir={tmp_path}", "--mode=sample"]) == 2
    error = capsys.readouterr().err
    assert "config.json is not a config" in error and error.count("\n") == 1


def test_a_workdir_that_is_a_file_or_cannot_be_made_is_refused(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert main([DIGITS, f"--workdir={tmp_path}/file"]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main([DIGITS, "--workdir=/proc/none/run"]) == 2
    assert "/proc/none/run cannot be written" in capsys.readouterr().err


def test_flags_of_several_hosts_belong_together(capsys, tmp_path):
    assert main([DIGITS, f"--workdir={tmp_path}", "--process_id=1"]) == 2
    assert "belong together" in capsys.readouterr().err


def test_errors_show_no_traceback_from_the_shell():
    process = start([DIGITS, "--config.modle.channels=3"])
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert errors == "error: --config.modle.channels: no such key; did you mean model.channels?\n"


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "train.learning_rate (0.0002): Adam's step size" in capsys.readouterr().out


def test_check_shows_config_shapes_and_cost_and_starts_nothing(tmp_path, capsys):
    assert main(arguments(tmp_path / "run", mode="check")) == 0
    out = capsys.readouterr().out
    for part in (
        "train.batch_size = 8",
        "digits/train, 1,541 images (8, 8, 1)",
        "conv_in/kernel",
        "3×3×1×8",
        "parameters in all: ",
        "L_T ≤ ",
        "GFLOP",
        "MiB of temporary memory",
    ):
        assert part in out, part
    assert not (tmp_path / "run").exists()


def test_check_counts_the_work_of_a_step_whatever_the_loops(tmp_path, capsys):
    def flops(**overrides):
        assert main(arguments(tmp_path, mode="check", **overrides)) == 0
        out = capsys.readouterr().out
        parts = re.search(r"over 1 devices(, in \d parts one after another)?", out)[1]
        return float(re.search(r"([\d.]+) GFLOP", out)[1]), parts

    whole, parts = flops()
    assert whole > 0 and parts is None
    dealt = flops(train__steps_per_call=5, parallel__microbatches=4)
    assert dealt == (whole, ", in 4 parts one after another")


def test_the_work_of_a_step_is_counted_on_a_cpu_whatever_else_there_is(monkeypatch):
    """Lowered for a GPU or a TPU no program says what it costs: it is None there."""

    class Lowered:
        def cost_analysis(self):
            on = jax.config.jax_default_device
            return {"flops": 7.0} if on is not None and on.platform == "cpu" else None

    monkeypatch.setattr(check, "lowered_step", lambda job: Lowered())
    assert check.step_flops(None) == 7.0

    def without_cpus(backend=None):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", without_cpus)
    assert np.isnan(check.step_flops(None))


def test_check_warns_of_a_chain_that_does_not_reach_noise(tmp_path, capsys):
    assert main(arguments(tmp_path, mode="check", diffusion__beta_end=0.02)) == 0
    assert "x_T is far from N(0, I)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices", ["mu,vlb,learned", "x0,simple,fixed_small", "v,hybrid,learned_range"]
)
def test_variants_train_and_sample(tmp_path, choices):
    argv = arguments(tmp_path)
    argv[0] += f":{choices}"
    assert main(argv) == 0
    assert main([f"--workdir={tmp_path}", "--mode=sample"]) == 0
    assert train(tmp_path / "other", parallel__mode="jitt") == 2
