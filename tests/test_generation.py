"""Samples by index: image k is the same whatever else is drawn, and sampling goes on."""

import copy
import dataclasses
import itertools
import json
import shutil
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.extend.core import jaxprs_in_params
from PIL import Image
from runs_for_tests import arguments, start, train

from ddpm_jax import figures, files, generation, keys, parts, runs, sampling
from ddpm_jax.config import RequestError
from ddpm_jax.interruption import Watch
from ddpm_jax.main import main
from ddpm_jax.training.metrics import NonFiniteError


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert train(workdir, train__steps=10) == 0
    return workdir


def draw(workdir, **overrides):
    settings = {"count": 10, "batch_size": 4} | overrides
    flags = [f"--config.sample.{key}={value}" for key, value in settings.items()]
    before = set((workdir / "samples").glob("*.npz"))
    assert main([f"--workdir={workdir}", "--mode=sample", *flags]) == 0
    (new,) = set((workdir / "samples").glob("*.npz")) - before
    images, protocol = generation.load_images(new)
    return images, protocol, new


def test_no_step_of_a_chain_rounds_kernels_again(run_directory, monkeypatch):
    monkeypatch.setattr(generation, "network_jit", jax.jit)  # Options are for programs alone.
    run = runs.load(run_directory)
    model = run.model.clone(dtype=jnp.bfloat16)
    sampler = generation.compile_sampler(
        run.layout, run.process, model, run.config, run.params_sharding
    )
    traced = jax.make_jaxpr(sampler)(run.params, jnp.arange(2))
    rounds = [0, 0]  # Before the loop, and in it.

    def count(jaxpr, inside):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if name == "convert_element_type" and equation.params["new_dtype"] == jnp.bfloat16:
                rounds[inside] += equation.invars[0].aval.shape[:2] == (3, 3)
            for inner in jaxprs_in_params(equation.params):
                count(inner, inside or name == "scan")

    count(traced.jaxpr, False)
    assert rounds == [sum(x.ndim == 4 for x in jax.tree.leaves(run.params)), 0]


def test_samples_are_saved_with_their_protocol(run_directory):
    images, protocol, path = draw(run_directory, method="ddim", steps=5, eta=0.5)
    assert images.shape == (10, 8, 8, 1) and images.dtype == np.uint8
    assert protocol == {
        "checkpoint": 10,
        "parameters": "ema",
        "parameters_crc32": runs.fingerprint(runs.load(run_directory).params),
        "schedule": "linear",
        "num_steps": 20,
        "beta_start": 1e-4,
        "beta_end": 0.4,
        "prediction": "eps",
        "variance": "fixed_small",
        "dtype": "float32",
        "sampler": "ddim",
        "steps": 5,
        "eta": 0.5,
        "clip": True,
        "seed": 0,
        "count": 10,
        "rounding": "nearest of 256 levels",
        "version": 1,
    }
    assert path.name == "step10_ddim5_eta0.5_seed0_10.npz"
    picture = np.asarray(Image.open(path.with_name(f"{path.stem}_grid_00000.png")))
    assert picture.max() > picture.min()
    assert not path.with_suffix(".parts").exists()


def test_image_k_is_the_same_in_batches_of_every_size(run_directory):
    ten, _, _ = draw(run_directory, count=10, batch_size=4)
    seven, _, _ = draw(run_directory, count=7, batch_size=4)
    np.testing.assert_array_equal(seven, ten[:7])
    three, _, _ = draw(run_directory, count=3, batch_size=3)
    difference = np.abs(three.astype(int) - ten[:3])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    assert (np.abs(ten[0].astype(int) - ten[1]) > 0).mean() > 0.3


def test_interrupted_sampling_goes_on_to_the_bit(run_directory, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(run_directory, tmp_path / "run")
    whole, _, path = draw(workdir, count=11)
    path.unlink()
    written = []
    original = files.replace_with

    def interrupting(path, write):
        original(path, write)
        if path.parent.suffix == ".parts" and path.suffix == ".npz":
            written.append(path)
            if len(written) == 1:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(files, "replace_with", interrupting)
    flags = ["--config.sample.count=11", "--config.sample.batch_size=4"]
    assert main([f"--workdir={workdir}", "--mode=sample", *flags]) == 75
    assert "4 of 11 images are in" in capsys.readouterr().err
    again, _, path = draw(workdir, count=11)
    np.testing.assert_array_equal(again, whole)
    assert [part.stem for part in written] == ["00000000_4", "00000004_4", "00000008_3"]


def test_pieces_are_computed_around_those_of_any_length():
    there = {0: 4, 7: 2}
    assert parts.missing(there, 12, 5) == [(4, 3), (9, 3)]
    assert parts.missing(there, 9, 2) == [(4, 2), (6, 1)]


def test_a_damaged_piece_is_computed_again(tmp_path, caplog):
    calls = []

    def piece(start, length):
        calls.append(start)
        return {"x": np.arange(start, start + length)}

    def collect(count):
        kept = {"directory": epath.Path(tmp_path), "protocol": {"a": 1}}
        return parts.collect(count, 3, piece, "image", print, **kept)["x"].tolist()

    collect(6)
    (tmp_path / "foreign.npz").write_bytes(b"")
    damaged = tmp_path / "00000003_3.npz"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    assert collect(9) == list(range(9))
    assert calls == [0, 3, 3, 6] and "00000003_3.npz cannot be read" in caplog.text


def test_a_piece_over_another_is_left_out(tmp_path):
    kept = {"directory": epath.Path(tmp_path), "protocol": {"a": 1}}
    numbers = lambda start, length: {"x": np.arange(start, start + length)}  # noqa: E731
    for batch in (4, 2):
        parts.collect(8, batch, numbers, "image", print, **kept)
        for path in tmp_path.glob("00000004_4.npz"):
            path.rename(tmp_path / "aside")
    (tmp_path / "aside").rename(tmp_path / "00000004_4.npz")
    assert parts.collect(8, 2, numbers, "image", print, **kept)["x"].tolist() == list(range(8))


def test_progress_counts_the_work_that_is_left(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        parts,
        "Progress",
        lambda step, total, *_: (
            shown.append((step, total)) or SimpleNamespace(update=shown.append, close=lambda: None)
        ),
    )
    kept = {"directory": epath.Path(tmp_path), "protocol": {"a": 1}}
    one = lambda start, length: {"x": np.zeros(length)}  # noqa: E731
    parts.collect(4, 4, one, "image", print, **kept)
    parts.collect(10, 4, one, "image", print, **kept)
    assert shown == [(0, 4), 4, (4, 10), 8, 10]


def test_long_work_is_announced_after_two_pieces(monkeypatch):
    clock = itertools.count(0, 30)  # Each piece takes 30 seconds by it.
    monkeypatch.setattr(parts.time, "monotonic", lambda: next(clock))
    said = []
    parts.collect(100, 10, lambda start, length: {"x": np.zeros(length)}, "image", said.append)
    assert [line for line in said if "more: about" in line] == ["80 images more: about 4 min"]


def test_a_damaged_file_of_samples_is_named(run_directory, tmp_path):
    workdir = shutil.copytree(run_directory, tmp_path / "run")
    run, directory = runs.load(workdir), runs.RunDirectory.of(workdir).samples
    path = generation.generate(run, directory, print)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(RequestError, match=f"{path.name} cannot be read; move it away"):
        generation.generate(run, directory, print)


def test_a_signal_at_the_very_end_is_for_the_outer_watch():
    with Watch() as outer:
        with Watch() as inner:
            assert not inner.asked()
            signal.raise_signal(signal.SIGTERM)
        assert outer.asked()


def test_samples_that_are_not_numbers_are_refused(run_directory):
    run = runs.load(run_directory)
    broken = jax.tree.map(lambda x: x * np.float32("nan"), run.params)
    sampler = generation.compile_sampler(
        run.layout, run.process, run.model, run.config, run.params_sharding
    )
    assert generation.draw(sampler, run.params, 3, 4, print)["images"].shape == (3, 8, 8, 1)
    with pytest.raises(NonFiniteError, match=r"3 of the samples 0\.\.2 are not finite"):
        generation.draw(sampler, broken, 3, 4, print)


def test_the_share_outside_is_that_beyond_half_a_level(run_directory):
    run = runs.load(run_directory)
    config = copy.deepcopy(run.config)
    config.sample.clip = False
    args = run.layout, run.process, run.model, config, run.params_sharding
    drawn = generation.compile_sampler(*args)(run.params, jnp.arange(4))
    noise_keys = keys.example_keys(config.seed, "sample", 0, jnp.arange(4))
    x0 = sampling.sample(
        run.process, lambda x, t: run.apply(run.params, x, t), (8, 8, 1), noise_keys, clip=False
    )
    beyond = np.abs(np.asarray(x0, np.float64)) > 1 + 1 / 255
    np.testing.assert_allclose(drawn.outside, beyond.mean(axis=(1, 2, 3)), atol=1.5 / 64)
    assert 0 < float(drawn.outside.mean()) < 1


def test_samples_of_other_parameters_under_the_same_name_are_refused(run_directory, tmp_path):
    workdir = shutil.copytree(run_directory, tmp_path / "run")
    run = runs.load(workdir)
    directory = runs.RunDirectory.of(workdir).samples
    path = generation.generate(run, directory, print)
    assert generation.generate(run, directory, print) == path
    other = dataclasses.replace(run, params=jax.tree.map(lambda x: x + 1, run.params))
    with pytest.raises(RequestError, match="drawn with parameters_crc32="):
        generation.generate(other, directory, print)


def test_a_config_of_another_model_is_refused(run_directory, capsys):
    for change in ("diffusion.prediction=mu", "model.channels=16", "diffusion.schedule=cosine"):
        flags = [f"--workdir={run_directory}", "--mode=sample", f"--config.{change}"]
        assert main(flags) == 2
        error = capsys.readouterr().err
        assert f"{change.split('=')[0]} was" in error and error.count("\n") == 1


def test_parts_drawn_in_another_way_are_refused(run_directory, tmp_path, capsys):
    workdir = shutil.copytree(run_directory, tmp_path / "run")
    parts = workdir / "samples" / "step10_ancestral20_seed0_9.parts"
    parts.mkdir()
    (parts / "protocol.json").write_text(json.dumps({"seed": 3}))
    flags = ["--config.sample.count=9", "--config.sample.batch_size=4"]
    assert main([f"--workdir={workdir}", "--mode=sample", *flags]) == 2
    assert "delete the directory" in capsys.readouterr().err


@pytest.mark.slow
def test_eight_devices_draw_the_same_images(run_directory, tmp_path):
    one, _, _ = draw(run_directory, count=16, batch_size=16)
    workdir = shutil.copytree(run_directory, tmp_path / "run")
    for path in (workdir / "samples").glob("*.npz"):
        path.unlink()
    argv = arguments(workdir, mode="sample", sample__count=16, sample__batch_size=16)
    process = start(argv[1:], devices=8)
    assert process.wait(timeout=200) == 0, process.communicate()
    (path,) = (workdir / "samples").glob("*.npz")
    eight, _ = generation.load_images(path)
    difference = np.abs(one.astype(int) - eight)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_a_run_loads_with_its_average_or_its_parameters(run_directory):
    ema, raw = runs.load(run_directory), runs.load(run_directory, ema=False)
    assert (ema.step, ema.model) == (10, raw.model)
    kernels = [np.asarray(run.params["conv_in"]["kernel"]) for run in (ema, raw)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-6


def test_grids_hold_every_image_in_reading_order():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 2, 3, 1), np.uint8)
    picture = figures.grid(images, columns=3)
    assert picture.shape == (2 * 3 + 1, 3 * 4 + 1, 1)
    cells = [picture[1 + 3 * (k // 3), 1 + 4 * (k % 3), 0] for k in range(5)]
    assert cells == [0, 1, 2, 3, 4]
    assert picture[4, 9, 0] == 128  # Nobody's place.
