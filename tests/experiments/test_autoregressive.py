"""Masking one coordinate a step: the bound is an autoregressive model's likelihood, exactly."""

import argparse
import csv
import itertools
import json
import math
import shutil
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import scipy.special
import scipy.stats
from runs_for_tests import ROOT, start, train

from ddpm_jax import keys, runs, schedules
from ddpm_jax.config import RequestError, default_config, load_file, override
from ddpm_jax.data import ArraySource
from ddpm_jax.diffusion import Process
from ddpm_jax.interruption import Interrupted
from ddpm_jax.main import reported
from ddpm_jax.models import UNet
from ddpm_jax.parallel import make_layout
from ddpm_jax.training import job
from ddpm_jax.training.metrics import NonFiniteError
from ddpm_jax.training.state import init_state, make_optimizer
from experiments import autoregressive, masked_model, masking
from experiments.common import Study
from experiments.masked_model import DisagreementError, Model, make_order
from experiments.masking import Masking

D, K = 4, 3
ORDER = np.array([2, 0, 3, 1])
PROCESS = Masking(ORDER, K)
EVERY = np.array(list(itertools.product(range(K), repeat=D)), np.int32)  # All 81 images.
RNG = np.random.default_rng(0)
WEIGHTS, BIAS = RNG.normal(size=(D * (K + 1), K)), RNG.normal(size=(D + 1, K))
LEVELS = np.array([0, 100, 255], np.uint8)


def toy(xp):
    """A conditional that depends on all that is there, with NumPy or JAX."""

    def logits(x_t, t):
        known = (x_t[..., None] == np.arange(K + 1)).reshape(len(x_t), -1)
        return 2 * xp.sin(known @ xp.asarray(WEIGHTS) + xp.asarray(BIAS)[t])

    return logits


def by_hand(image, logits, order=ORDER, levels=K):
    """log p(x^i | x^{>i}) of one image, i = 1..T first to last, in loops."""
    found = []
    for i in range(1, len(order) + 1):
        context = np.full((1, len(order)), levels)
        for later in order[i:]:
            context[0, later] = image[later]
        row = np.asarray(logits(context, np.array([i])), np.float64)[0]
        row = row - row.max()
        found.append(row[image[order[i - 1]]] - math.log(sum(math.exp(v) for v in row)))
    return found


@pytest.fixture(scope="module")
def exact():
    """Of all 81 images, by hand in float64: [81, T]."""
    return np.array([by_hand(image, toy(np)) for image in EVERY])


@pytest.fixture(scope="module")
def unet():
    """A U-Net over 2×2 images of three levels, away from its nearly uniform start."""
    network = UNet(8, (1,), 1, (), out_channels=K, norm_groups=4)
    optimizer = make_optimizer(default_config().train)
    make = jax.jit(lambda: init_state(network, optimizer, (2, 2, 2), 0).params)
    params = jax.tree.map(
        lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), make()
    )
    return Model(PROCESS, LEVELS, network, (2, 2, 1)), params


def test_the_forward_process_blanks_one_coordinate_a_step():
    x0 = EVERY[50:51]
    before = masking.q_sample(PROCESS, x0, jnp.array([0]))
    np.testing.assert_array_equal(before, x0)
    for t in range(1, D + 1):
        after = np.asarray(masking.q_sample(PROCESS, x0, jnp.array([t])))
        changed = np.flatnonzero(after != np.asarray(before))
        assert changed.tolist() == [ORDER[t - 1]] and after[0, ORDER[t - 1]] == K
        before = after
    assert (before == K).all()
    with pytest.raises(ValueError, match="each of"):
        Masking(np.array([0, 1, 1, 3]), K)


def test_the_bound_is_the_log_likelihood_by_the_chain_rule_and_both_are_right(exact):
    with jax.enable_x64(True):
        bound = masking.bound_terms(PROCESS, toy(jnp), jnp.asarray(EVERY))
        chain = masking.chain_rule(PROCESS, toy(jnp), jnp.asarray(EVERY))
        assert bound.dtype == chain.dtype == np.float64
    np.testing.assert_allclose(bound[:, :-1], -exact, rtol=1e-12)
    np.testing.assert_allclose(chain, exact, rtol=1e-12)
    assert (np.asarray(bound[:, -1]) == 0).all()
    # A distribution over all images.
    np.testing.assert_allclose(np.exp(-np.asarray(bound).sum(axis=1)).sum(), 1, rtol=1e-12)


def test_a_network_s_bound_is_normalised_and_its_chain_rule(unet):
    model, params = unet
    bound, chain = jax.jit(
        lambda x: (
            masking.bound_terms(PROCESS, model.conditional(params), x),
            masking.chain_rule(PROCESS, model.conditional(params), x),
        )
    )(EVERY)
    np.testing.assert_allclose(bound[:, :-1], -np.asarray(chain), rtol=1e-5, atol=1e-6)
    p = np.exp(-np.asarray(bound, np.float64).sum(axis=1))
    assert p.max() > 3 * p.min()
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
    hand = [by_hand(image, jax.jit(model.conditional(params))) for image in EVERY[::16]]
    np.testing.assert_allclose(chain[::16], hand, rtol=1e-5, atol=1e-6)


def test_what_is_copied_costs_exactly_nothing_and_the_rest_is_its_cross_entropy(exact):
    for t in range(1, D + 1):
        kl = masking.kl_of_coordinates(PROCESS, toy(jnp), jnp.asarray(EVERY), jnp.full(81, t))
        kl = np.asarray(kl)
        np.testing.assert_allclose(kl[:, ORDER[t - 1]], -exact[:, t - 1], rtol=1e-5)
        assert (np.delete(kl, ORDER[t - 1], axis=1) == 0).all()


def test_a_reverse_step_is_a_distribution_that_copies_and_never_leaves_its_coordinate_blank():
    for t in range(1, D + 1):
        times = jnp.full(81, t)
        x_t = masking.q_sample(PROCESS, jnp.asarray(EVERY), times)
        logits = toy(jnp)(x_t, times)
        p = np.exp(masking.p_log_probabilities(PROCESS, logits, x_t, times))
        np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-5)
        predicted = p[:, ORDER[t - 1]]
        np.testing.assert_allclose(
            predicted[:, :K], scipy.special.softmax(np.asarray(logits), axis=-1), rtol=1e-5
        )
        assert (predicted[:, K] == 0).all()
        others = np.delete(np.arange(D), ORDER[t - 1])
        certain = np.eye(K + 1)[np.asarray(x_t)]
        np.testing.assert_array_equal(p[:, others], certain[:, others])


def test_the_kl_is_that_of_any_categorical_distributions():
    q, p = RNG.dirichlet(np.ones(5), (2, 7))
    q[0], p[1] = [1, 0, 0, 0, 0], [0.5, 0, 0.5, 0, 0]
    with np.errstate(divide="ignore"):
        got = masking.categorical_kl(jnp.log(jnp.asarray(q)), jnp.log(jnp.asarray(p)))
    np.testing.assert_allclose(got, scipy.special.rel_entr(q, p).sum(axis=1), rtol=1e-4)
    assert np.isinf(got[1])
    # Nor is a gradient 0 · ∞ where both are 0.
    q, p = np.array([0.25, 0.75, 0]), np.array([0.5, 0.5, 0])
    with np.errstate(divide="ignore"):
        log_q, log_p = jnp.log(jnp.asarray(q)), jnp.log(jnp.asarray(p))
    gradient = jax.grad(masking.categorical_kl)(log_q, log_p)
    np.testing.assert_allclose(gradient, q + scipy.special.rel_entr(q, p), rtol=1e-5)


def task_of(model, flip):
    config = load_file(f"{ROOT}/configs/digits.py")
    config.model.update(channels=8, channel_multipliers=(1,), attention_resolutions=())
    config.train.update(batch_size=D, timesteps="stratified")
    config.train.keep_best = "bits_per_dim_test"  # A result that is not measured here.
    config.evaluation.split = ("train",)
    config.data.flip, config.seed = flip, 3
    task = masked_model.make_task(config, model)
    return jax.jit(
        lambda params, images: masked_model.losses(model, task, params, images, jnp.arange(D), 5)
    )


def test_the_training_loss_averages_to_the_bound_over_every_t(unet):
    """Stratified, a batch of T has each t once: an average without chance."""
    model, params = unet
    conditional = jax.jit(model.conditional(params))
    losses = task_of(model, flip=False)
    for image in EVERY[[7, 70]]:
        batch = jnp.asarray(np.repeat(model.decode(image[None]), D, axis=0))
        loss, t = losses(params, batch)
        assert np.asarray(t).tolist() == [1, 2, 3, 4]
        bound = -sum(by_hand(image, conditional)) / math.log(2) / D  # Bits/dim.
        np.testing.assert_allclose(np.mean(loss), bound, rtol=1e-5)


def test_the_loss_s_gradient_is_that_of_a_softmax():
    x0, t = jnp.asarray(EVERY[40:41]), jnp.array([3])
    logits = jnp.array([[0.3, -1.0, 0.5]])
    loss = lambda z: masking.kl_of_coordinates(PROCESS, lambda *_: z, x0, t).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(logits)
    expected = scipy.special.softmax(np.asarray(logits, np.float64))
    expected[0, EVERY[40, ORDER[2]]] -= 1
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_mirrored_images_are_trained_on_where_the_run_mirrors_them(unet):
    model, params = unet
    conditional, index = jax.jit(model.conditional(params)), jnp.arange(D)
    images = jnp.asarray(np.repeat(model.decode(np.array([[0, 2, 1, 0]])), D, axis=0))
    got, t = task_of(model, flip=True)(params, images)
    flip = [bool(jax.random.bernoulli(k)) for k in keys.example_keys(3, "flip", 5, index)]
    assert 0 < sum(flip) < D
    seen = [[2, 0, 0, 1] if mirrored else [0, 2, 1, 0] for mirrored in flip]
    want = [
        -by_hand(np.array(x), conditional)[k - 1] / math.log(2)
        for x, k in zip(seen, np.asarray(t), strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_samples_follow_the_model_s_distribution(exact):
    n = 20_000
    sample_keys = keys.example_keys(1, "sample", 0, jnp.arange(n))
    drawn = np.asarray(jax.jit(lambda k: masking.sample(PROCESS, toy(jnp), k))(sample_keys))
    counts = np.bincount(drawn @ K ** np.arange(D)[::-1], minlength=81)
    expected = n * np.exp(exact.sum(axis=1))
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


def test_every_reverse_step_copies_what_is_there_and_fills_one_coordinate():
    sample_keys = keys.example_keys(2, "sample", 0, jnp.arange(50))
    final = masking.sample(PROCESS, toy(jnp), sample_keys)
    x_t = jnp.full((50, D), K, jnp.int32)
    for t in range(D, 0, -1):
        np.testing.assert_array_equal(x_t, masking.q_sample(PROCESS, final, jnp.full(50, t)))
        logits = toy(jnp)(x_t, jnp.full(50, t))
        after = masking.ancestral_step(PROCESS, logits, x_t, jnp.full(50, t), sample_keys)
        assert (after != x_t).sum() == 50 and (after[:, ORDER[t - 1]] < K).all()
        x_t = after
    np.testing.assert_array_equal(x_t, final)
    assert len(np.unique(np.asarray(final), axis=0)) > 10


def test_orders():
    raster = make_order("raster", 0, 6)
    assert raster.tolist() == [5, 4, 3, 2, 1, 0]  # The first coordinate is the last one blanked.
    one, same, other = (make_order("random", seed, 64) for seed in (0, 0, 1))
    assert (one == same).all() and (one != other).any()
    assert sorted(one) == list(range(64)) and one.tolist() not in ([*range(64)], [*range(64)][::-1])


class Labels:
    """A network whose outputs say where they are and what it was shown."""

    def __init__(self):
        self.seen = []

    def apply(self, variables, x, t, dropout_keys):
        self.seen.append((np.asarray(x), np.asarray(t)))
        batch, h, w, c = x.shape
        out = np.arange(h * w * (c // 2) * K).reshape(h, w, c // 2 * K)
        return jnp.broadcast_to(jnp.asarray(out, jnp.float32), (batch, *out.shape))


def test_the_network_is_shown_what_is_known_and_read_at_the_coordinate_s_place():
    shape, network = (2, 3, 2), Labels()
    order = np.random.default_rng(1).permutation(12)
    model = Model(Masking(order, K), LEVELS, network, shape)
    images = LEVELS[np.random.default_rng(2).integers(0, K, (12, *shape))]
    x0 = model.encode(jnp.asarray(images))
    np.testing.assert_array_equal(model.decode(np.asarray(x0)), images)
    times = np.arange(1, 13)
    x_t = masking.q_sample(model.masking, x0, jnp.asarray(times))
    logits = model.conditional(None)(x_t, jnp.asarray(times))
    (x, t), *_ = network.seen
    np.testing.assert_array_equal(t, times)
    for n, step in enumerate(times):
        row, column, channel = np.unravel_index(order[step - 1], shape)
        place = ((row * 3 + column) * 2 + channel) * K
        np.testing.assert_array_equal(logits[n], place + np.arange(K))
        known = np.ones(12)
        known[order[:step]] = 0
        known = known.reshape(shape)
        np.testing.assert_array_equal(x[n, ..., 2:], known)
        np.testing.assert_allclose(x[n, ..., :2], known * (images[n] / 127.5 - 1), atol=1e-6)


def test_histograms_of_each_coordinate_alone():
    model = Model(PROCESS, LEVELS, None, (2, 2, 1))
    training = ArraySource("toy", "train", LEVELS[RNG.integers(0, 2, (9, 2, 2, 1))])
    images = LEVELS[RNG.integers(0, K, (5, 2, 2, 1))]
    got = autoregressive.histogram_bits(model, training, images)
    for n, d in itertools.product(range(5), range(4)):
        same = training.images(np.arange(9)).reshape(9, 4)[:, d] == images.reshape(5, 4)[n, d]
        assert got[n, d] == pytest.approx(-math.log2((same.sum() + 1) / (9 + K)))


@pytest.mark.parametrize(("steps", "clip"), [(0, True), (4, False)])
def test_the_gaussian_decoder_on_the_levels_alone(tmp_path, steps, clip):
    """Against SciPy, the mean over the draws of the bound; one program, whose last batch is not
    full; kept for the next time, but not for other draws."""
    process = Process(schedules.linear(10, 0.01, 0.3), "eps", "fixed_small")
    config, shapes = default_config(), []
    config.evaluation.update(batch_size=4, draws=2, steps=steps, clip=clip)
    config.seed = 4

    def apply(variables, x, t):
        shapes.append(x.shape)
        return variables["params"] * x * (1 + t[:, None, None, None])

    network = types.SimpleNamespace(apply=apply)
    params = jax.device_put(np.float32(0.6), make_layout("jit").replicated)
    run = runs.Run(config, process, network, params, 1, make_layout("jit"))
    images = LEVELS[RNG.integers(0, K, (6, 2, 2, 1))]
    positions = np.array([3, 5, 6, 10, 11, 20])
    setup = types.SimpleNamespace(
        model=Model(PROCESS, LEVELS, None, (2, 2, 1)), positions=positions
    )
    said = []
    study = Study("toy", run, runs.RunDirectory.of(tmp_path), None, said.append)
    got = autoregressive.bits_saved(study, setup, images)
    assert got.dtype == np.float64 and shapes == [(4, 2, 2, 1)] and not said
    np.testing.assert_array_equal(autoregressive.bits_saved(study, setup, images), got)
    assert len(said) == 1 and "computed before" in said[0]

    times = [1, 4, 7, 10] if steps else range(1, 11)
    alpha_bar = np.cumprod(1 - np.linspace(0.01, 0.3, 10))[[t - 1 for t in times]]
    noise = [
        keys.normal(keys.example_keys(4, "bound", draw, jnp.asarray(positions)), 1, (2, 2, 1))
        for draw in (0, 1)
    ]
    x0 = images / 127.5 - 1
    x_1 = np.sqrt(alpha_bar[0]) * x0 + np.sqrt(1 - alpha_bar[0]) * np.stack(noise)
    # The network is told t = 1. At its t the posterior's mean is x̂_0.
    mean = (x_1 - np.sqrt(1 - alpha_bar[0]) * 1.2 * x_1) / np.sqrt(alpha_bar[0])
    mean = np.clip(mean, -1, 1) if clip else mean
    beta_2 = 1 - alpha_bar[1] / alpha_bar[0]
    sigma = np.sqrt((1 - alpha_bar[0]) / (1 - alpha_bar[1]) * beta_2)  # β̃_2.
    edges = LEVELS / 127.5 - 1
    above = np.where(edges == 1, np.inf, edges + 1 / 255)
    below = np.where(edges == -1, -np.inf, edges - 1 / 255)
    cdf = lambda x: scipy.stats.norm.cdf((x - mean[..., None]) / sigma)  # noqa: E731
    mass = (cdf(above) - cdf(below)).sum(axis=-1)
    of_draws = -np.log2(mass).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(got, of_draws.mean(axis=0), rtol=1e-3)
    config.evaluation.draws = 1
    one = autoregressive.bits_saved(study, setup, images)
    np.testing.assert_allclose(one, of_draws[0], rtol=1e-3)
    assert np.abs(one - got).max() > 0.01 * got.max()


def test_the_map_of_costs_has_each_pixel_in_its_place():
    model = Model(Masking(np.array([3, 0, 5, 1, 4, 2]), K), LEVELS, None, (1, 3, 2))
    # Coordinates 0 and 1 are those of the first pixel, blanked at t = 2 and 4.
    bits = autoregressive.pixel_bits(model, np.array([1.0, 2, 4, 8, 16, 32]))
    np.testing.assert_array_equal(bits, [[2 + 8, 32 + 1, 16 + 4]])


def test_a_level_that_the_training_split_lacks_is_refused():
    source = ArraySource("toy", "test", np.array([[0, 100], [37, 255]], np.uint8)[None, ..., None])
    with pytest.raises(RequestError, match=r"level 37 occurs in toy/test.* another --split"):
        masked_model.check_levels(source.images(np.arange(1)), LEVELS, source)
    masked_model.check_levels(np.array([0, 255], np.uint8), LEVELS, source)
    config = ml_collections.ConfigDict({"data": {"resident_bytes": 100}})
    assert masked_model.occurring_levels(source, config).tolist() == [0, 37, 100, 255]
    config.data.resident_bytes = 3
    assert len(masked_model.occurring_levels(source, config)) == 256


# Whole runs.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny trained run, whose figure has been made: its directory, and the lines printed."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    assert train(workdir, seed=3) == 0
    return workdir


def figure(run, *flags):
    return autoregressive.main([f"--run={run}", "--images=5", *flags])


def prepared(run, *flags, **overrides):
    """What `autoregressive.work` starts from; overrides are spelled train__steps=…."""
    parser = argparse.ArgumentParser()
    autoregressive.add_flags(parser)
    directory = runs.RunDirectory.of(run)
    flags = parser.parse_args(["--images=5", *flags])
    study = Study(autoregressive.NAME, runs.load(run), directory, flags, lambda line: None)
    for key, value in overrides.items():
        override(study.run.config, key.replace("__", "."), value)
    return autoregressive.prepare(study)


def test_another_training_is_another_model(run):
    path = prepared(run).trainer.path
    assert prepared(run, train__checkpoint_every=5).trainer.path == path
    for key, value in {"train__learning_rate": 1e-4, "seed": 4, "model__dropout": 0.2}.items():
        assert prepared(run, **{key: value}).trainer.path != path, key


@pytest.mark.slow
def test_the_figure_and_its_numbers_by_hand(run, tmp_path, monkeypatch, capsys):
    other = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("autoregressive"))
    drawn, draw = [], autoregressive.draw
    monkeypatch.setattr(autoregressive, "draw", lambda *a: drawn.append(a) or draw(*a))
    assert figure(run, "--steps=5") == 0
    printed = capsys.readouterr().out
    assert "training for 5 steps" in printed and "agree on 5 images of digits/test" in printed
    figures = run / "figures"
    assert (figures / "autoregressive.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((figures / "autoregressive.json").read_text())
    assert content["protocol"]["steps"] == 5 and content["protocol"]["images"] == 5
    rows = list(csv.DictReader((figures / "autoregressive.csv").open()))
    assert [int(row["t"]) for row in rows] == list(range(64, 0, -1))

    # The bits of the pixels in reading order, from the network's logits, in loops.
    source = autoregressive.open_source(runs.RunDirectory.of(run).load_config(), "test")
    images = source.images(np.arange(5) * len(source) // 5)
    levels = np.rint(np.arange(17) * 255 / 16).astype(np.uint8)
    model, *_, trainer = prepared(run, "--steps=5")
    params, _ = trainer()
    apply = jax.jit(lambda x, t: model.network.apply({"params": params}, x, t))
    for pixel in (0, 1, 19, 36, 63):
        known = (np.arange(64) < pixel).reshape(8, 8, 1)
        x = np.where(known, images / 127.5 - 1, 0)
        x = np.concatenate([x, np.broadcast_to(known, x.shape)], axis=-1).astype(np.float32)
        logits = np.asarray(apply(x, jnp.full(5, 64 - pixel)), np.float64)
        logits = logits[:, pixel // 8, pixel % 8]
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        value = np.searchsorted(levels, images[:, pixel // 8, pixel % 8, 0])
        bits = -log_p[np.arange(5), value] / math.log(2)
        row = rows[pixel]
        assert (int(row["row"]), int(row["column"])) == (pixel // 8, pixel % 8)
        assert float(row["bits"]) == pytest.approx(bits.mean(), rel=1e-4)
        assert float(row["bits_error"]) == pytest.approx(bits.std(ddof=1) / 5**0.5, rel=1e-2)

    # The Gaussian's code lengths, of the same five images.
    ((setup, _, _, _, _, compared),) = drawn
    (path,) = (run / "evaluation").glob("step20_bound_test_*.npz")
    gaussian = np.load(path)["total"][:, 0][np.arange(5) * 256 // 5]
    assert float(compared["Gaussian diffusion, 256 bins"]) == pytest.approx(gaussian.mean())
    directory = runs.RunDirectory.of(run)
    study = Study(autoregressive.NAME, runs.load(run), directory, None, lambda line: None)
    saved_bits = autoregressive.bits_saved(study, setup, images).mean()
    on_levels = float(compared["Gaussian diffusion, 17 levels"])
    assert on_levels == pytest.approx(gaussian.mean() - saved_bits) and saved_bits > 0.1

    # Two devices, in a process of their own: the same to rounding.
    code = "import sys; from experiments.autoregressive import main; sys.exit(main())"
    process = start([f"--run={other}", "--images=5", "--steps=5"], devices=2, code=code)
    assert process.wait() == 0, process.stderr.read()
    split = list(csv.DictReader((other / "figures" / "autoregressive.csv").open()))
    for one, two in zip(rows, split, strict=True):
        assert float(one["bits"]) == pytest.approx(float(two["bits"]), rel=1e-3)

    # Again: nothing is trained or measured.
    assert figure(run, "--steps=5") == 0
    printed = capsys.readouterr().out
    assert "training" not in printed and printed.count("computed before") == 3


@pytest.mark.long
def test_more_steps_go_on_and_an_interruption_too_to_the_bit(run, tmp_path, monkeypatch):
    for name in ("one", "cut"):
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("autoregressive"))
    seeds, batches = [], masked_model.Batches
    spy = lambda source, seed, *rest: seeds.append(seed) or batches(source, seed, *rest)  # noqa: E731
    monkeypatch.setattr(masked_model, "Batches", spy)
    whole = prepared(tmp_path / "one", "--steps=10").trainer
    cut = prepared(tmp_path / "cut", "--steps=10").trainer
    answers = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(masked_model.Watch, "asked", lambda self: next(answers))
        with pytest.raises(Interrupted, match="stopped at step 3; the same command goes on"):
            cut()
    prepared(tmp_path / "cut", "--steps=7").trainer()
    cut = prepared(tmp_path / "cut", "--steps=10").trainer
    (one, lines), (other, other_lines) = whole(), cut()
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert lines == other_lines and [line["step"] for line in lines] == [5, 10]
    written = [(t.path / "metrics.jsonl").read_text() for t in (whole, cut)]
    assert written[0] == written[1] and len(written[0].splitlines()) == 2
    assert {*seeds} == {3}  # The run's own: its order of the images.
    states = [saved(t.path) for t in (whole, cut)]  # The optimizer's state as well.
    assert states[0] == states[1] and len(states[0]) > 50
    match = "has been trained for 10 steps; choose --steps=10 or more"
    with pytest.raises(RequestError, match=match):
        prepared(tmp_path / "cut", "--steps=5")
    assert prepared(tmp_path / "cut").trainer.steps == 10  # Of a default of 3.
    # Another order is another model, and the parameters themselves are not their average.
    prepared(tmp_path / "cut", "--steps=5", "--order=random")
    raw, _ = prepared(tmp_path / "cut", "--steps=10", evaluation__ema=False).trainer()
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (one, raw)), strict=True))


def saved(path):
    """The checksums of all leaves of the newest checkpoint."""
    newest = max((path / "checkpoints").iterdir(), key=lambda p: int(p.name))
    return json.loads((newest / "meta" / "metadata").read_text())["checksums"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--steps=3", "--config.train.steps_per_call=5"],
            "--steps=3: must be a positive multiple",
        ),
        (["--steps=0"], "--steps=0: must be a positive multiple of train.steps_per_call=1"),
        (["--images=-1"], "--images=-1: must be 0, for all of them, or more"),
        (["--order=hilbert"], "--order"),
        (["--split=nowhere"], "error: --split=nowhere: digits has the splits"),
    ],
)
def test_wrong_requests_are_refused_in_a_line_before_any_work(run, flags, message, capsys):
    assert figure(run, *flags) == 2
    out = capsys.readouterr()
    assert message in out.err and len(out.err.splitlines()) == 1 and not out.out


def test_a_batch_that_the_devices_cannot_share_is_refused_before_any_work(run, monkeypatch, capsys):
    monkeypatch.setattr(job, "make_layout", lambda *_: types.SimpleNamespace(num_devices=3))
    assert figure(run) == 2
    out = capsys.readouterr()
    assert "train.batch_size=8 does not divide by 3: 3 devices" in out.err and not out.out


def test_bits_and_the_refusal_where_the_two_ways_differ(unet, monkeypatch, capsys):
    model, params = unet
    evaluation = {"batch_size": 81}
    config = {"evaluation": evaluation, "model": {"dtype": "float32"}}
    run = types.SimpleNamespace(config=ml_collections.ConfigDict(config), layout=make_layout("jit"))
    kept, protocols = [], []

    def arrays(protocol, count, batch, compute):
        protocols.append(json.dumps(protocol))
        kept.append(compute(0, count))
        return kept[-1]

    study = types.SimpleNamespace(run=run, say=print, arrays=arrays)
    images, chain_rule = model.decode(EVERY), masking.chain_rule
    found = masked_model.measure(study, model, params, images)
    p = 2 ** (-D * found["terms"].sum(axis=1))
    assert p.sum() == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(found["scores"], -found["terms"][:, :-1], rtol=1e-4, atol=1e-6)

    # Other images and other parameters have other arrays.
    masked_model.measure(study, model, params, images[::-1])
    masked_model.measure(study, model, jax.tree.map(lambda x: 2 * x, params), images)
    assert len({*protocols}) == len(kept) == 3

    # Nothing is kept of what does not agree: the same call could never go on from it.
    wrong = lambda *arguments: chain_rule(*arguments).at[70, 2].multiply(1.001)  # noqa: E731
    monkeypatch.setattr(masking, "chain_rule", wrong)
    with pytest.raises(DisagreementError, match=r"chain rule differ by .*: nothing") as raised:
        masked_model.measure(study, model, params, images)
    assert len(kept) == 3 and reported(raised_by(raised.value)) == 1
    assert capsys.readouterr().err.count("\n") == 1
    for name in ("terms", "scores"):
        bad = {key: values.copy() for key, values in found.items()}
        bad[name][3, 1] = np.nan
        with pytest.raises(NonFiniteError, match="not finite"):
            masked_model.check_equal(bad["terms"], bad["scores"], "float32")
    bad = found["terms"].copy()
    bad[2, -1] = 1e-9  # L_T is exactly 0.
    with pytest.raises(DisagreementError):
        masked_model.check_equal(bad, found["scores"], "float32")


def raised_by(error):
    """What fails with that error."""

    def work():
        raise error

    return work
