"""One run on any devices, in any mode, in any number of microbatches: the same numbers.

Sums over the batch in another order round otherwise. How much that may be is not chosen but
measured: as much as the run itself makes of parameters that before each of its steps are moved,
up or down by chance, to a neighbouring float32. That is what any rounding does, and leaf by leaf:
the bias of attention's keys, say, whose gradient is nothing but rounding, has Adam's whole steps
for its distance.
"""

import dataclasses
import functools
import itertools
import pathlib
import socket
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs_for_tests import ROOT, TINY, arguments, assert_equal_states, final_state, start

from ddpm_jax import config as config_lib
from ddpm_jax.config import RequestError
from ddpm_jax.data import Batches, open_source
from ddpm_jax.evaluation.bound import compile_terms
from ddpm_jax.generation import compile_sampler
from ddpm_jax.parallel import AXIS, Layout, compile_call, from_host, make_layout, to_host
from ddpm_jax.training import check
from ddpm_jax.training.job import initial_state, make_job, template
from ddpm_jax.training.job import microbatches as chosen_microbatches
from ddpm_jax.training.loop import headline
from ddpm_jax.training.step import seeded_call
from experiments import memory

STEPS, BATCH = 50, 32
DEVICES, MODES, MICROBATCHES = (1, 2, 4, 8), ("jit", "fsdp", "pmap"), (1, 2, 4)
STEPS_PER_CALL = {0: 1, 1: 1, 2: 10, 4: 1}  # By microbatches.
LONG = ["_".join(map(str, each)) for each in itertools.product(DEVICES, MODES, MICROBATCHES)]
# Each mode and each number of microbatches.
SHORT = ["1_jit_1", "2_pmap_4", "8_fsdp_2"]
# These also make their initial state, draw samples and measure the bound where they lie.
WHOLE = ("1_jit_1", "8_fsdp_2")
SHAKEN = [f"shaken_{i}" for i in range(4)]
WITHIN = 4  # Times the distance of the shaken runs. The largest of the long form's is 1.4.


def small_config(mode="jit", microbatches=1):
    """The small run's, with dropout, flips, clipping, warm-up and average."""
    config = config_lib.load_file(f"{ROOT}/configs/digits.py")
    changes = {
        "train.batch_size": BATCH,
        "train.steps": STEPS,
        "train.steps_per_call": STEPS_PER_CALL[microbatches],
        "parallel.mode": mode,
        "parallel.microbatches": microbatches,
    }
    for key, value in (TINY | changes).items():
        config_lib.override(config, key, value)
    return config


@functools.cache
def first_state():
    """The state before the first step, on the host: the same for all layouts."""
    job = make_job(small_config(), jax.local_devices()[:1])
    return jax.tree.map(to_host, jax.jit(initial_state(job.config, job.task))(0))


def placed(job):
    """The same, where a run's state lies."""
    return jax.tree.map(from_host, first_state(), job.sharding)


def trained(job, call, state):
    """The losses of STEPS steps and the state after them: `call`'s run."""
    per_call, losses = job.config.train.steps_per_call, []
    source = open_source(job.config, batch_size=BATCH)
    with Batches(source, 0, BATCH, per_call, job.layout.split(1), False) as batches:
        for step in range(0, STEPS, per_call):
            (_, state), metrics = call((np.int32(0), state), batches(step))
            losses.append(to_host(metrics["loss"]))
    return np.concatenate(losses), state


@functools.cache
def evaluator(devices, mode):
    """Gives samples and the terms of the bound by parameters that lie as a run's do."""
    job = make_job(small_config(mode), jax.devices()[:devices])
    run = template(job)
    sampler = compile_sampler(job.layout, run.process, run.model, run.config, run.params_sharding)
    terms = compile_terms(job.layout, run.process, run.apply, run.params_sharding, seed=0)
    indices = np.arange(BATCH)
    images = open_source(job.config, batch_size=BATCH).images(indices)

    def evaluate(params):
        samples = to_host(sampler(params, jnp.arange(BATCH)).images)
        return {"samples": samples, "bound": terms(params, images, indices, 0).terms}

    return evaluate


def save_run(directory, name, job, call, first, evaluate=None):
    """Saves what a run from the state `first` gives, arrays by name, as NAME.npz."""
    losses, state = trained(job, call, first)
    arrays = {"losses": losses} | (evaluate(state.ema_params) if evaluate else {})
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.ema_params)):
        arrays[jax.tree_util.keystr(path)] = to_host(leaf)
    if jax.process_index() == 0:
        np.savez(pathlib.Path(directory) / f"{name}.npz", **arrays)


@functools.cache
def made(name):
    """A layout's job, and the program of its calls, which takes ((seed, state), images)."""
    devices, mode, microbatches = name.split("_")
    job = make_job(small_config(mode, int(microbatches)), jax.devices()[: int(devices)])
    shardings = job.layout.replicated, job.sharding
    return job, compile_call(job.layout, functools.partial(seeded_call, job.task), shardings)


def shaken_call(call, rng, carried, images):
    """A call, with each parameter moved to a neighbouring float32, up or down, before it."""
    seed, state = carried

    def moved(x):
        up = rng.choice(np.float32([-np.inf, np.inf]), x.shape)
        return jax.device_put(np.nextafter(x, up), x.sharding)

    params = jax.tree.map(moved, state.params)
    return call((seed, dataclasses.replace(state, params=params)), images)


@pytest.mark.parametrize(
    ("config", "batch", "devices", "changes", "parts"),
    [
        # A map of the first resolution is 32 · 32 · 32 · 4 = 2^17 bytes an image; a part has 2^20.
        ("cifar10.py:small", 64, "cpu", {}, 8),
        ("cifar10.py:small", 32, "cpu", {}, 4),
        ("cifar10.py:small", 15, "cpu", {}, 1),
        ("cifar10.py:small", 84, "cpu", {}, 7),  # 10 and less, which divide it.
        ("cifar10.py:small", 97, "cpu", {}, 1),
        ("cifar10.py:small", 64, "cpu", {"model.dtype": "bfloat16"}, 4),
        ("cifar10.py:small", 64, "cpu", {"data.image_size": 16}, 2),
        ("cifar10.py:small", 32, "cpu", {"model.channels": 64}, 4),  # Of eight images.
        ("cifar10.py:small", 64, "cpu", {"model.channels": 96}, 1),
        ("cifar10.py:small", 64, "cpu cpu", {}, 1),
        ("cifar10.py:small", 64, "gpu", {}, 1),
        ("cifar10.py:small", 64, "cpu", {"parallel.microbatches": 1}, 1),
        ("cifar10.py:small", 64, "gpu gpu", {"parallel.microbatches": 16}, 16),
        ("cifar10.py", 128, "cpu", {}, 1),
        ("digits.py", 64, "cpu", {}, 1),
    ],
)
def test_narrow_networks_on_one_cpu_take_their_batch_in_parts(
    config, batch, devices, changes, parts
):
    config = config_lib.load_file(f"{ROOT}/configs/{config}")
    for key, value in ({"train.batch_size": batch} | changes).items():
        config_lib.override(config, key, value)
    config_lib.validate(config)
    devices = np.array([SimpleNamespace(platform=platform) for platform in devices.split()])
    layout = Layout("jit", SimpleNamespace(devices=devices, size=len(devices)))
    assert chosen_microbatches(config, layout) == parts


def test_the_parts_chosen_are_those_of_the_run():
    config = small_config(microbatches=0)
    config.train.batch_size, config.model.channels, config.data.image_size = 32, 32, 32
    job = make_job(config, jax.devices()[:1])
    assert job.task.microbatches == 4
    source = open_source(small_config(), batch_size=BATCH)
    assert " · batch 32 in 4 parts on 1 cpu (jit) · " in headline(job, source)


def run_layouts(directory, whole, names):
    """Saves the results of each layout; those in `whole` make and use states where they lie."""
    for name in names:
        job, call = made(name)
        if name in whole:
            first = jax.jit(initial_state(job.config, job.task), out_shardings=job.sharding)(0)
            evaluate = evaluator(job.layout.num_devices, job.layout.mode)
            save_run(directory, name, job, call, first, evaluate)
        else:
            save_run(directory, name, job, call, placed(job))


def run_on_one_host(directory, whole, *names):
    """In a process of its own: `run_layouts`, and the shaken runs on one device."""
    run_layouts(directory, whole.split(","), names)
    (job, call), evaluate = made("1_jit_1"), evaluator(1, "jit")
    for i, name in enumerate(SHAKEN):
        by_chance = functools.partial(shaken_call, call, np.random.default_rng(i))
        save_run(directory, name, job, by_chance, placed(job), evaluate)


def run_on_hosts(directory, whole, port, count, index, *names):
    """In the process of one of several hosts: `run_layouts` over the devices of all."""
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    run_layouts(directory, whole.split(","), names)


def begun(function, *words, devices):
    """A process of so many devices in which one of the functions above is called."""
    code = "import sys, test_layouts; getattr(test_layouts, sys.argv[1])(*sys.argv[2:])"
    return start([function, *map(str, words)], devices, code)


def finished(processes, directory):
    """What processes have saved: arrays by name, by NAME."""
    try:
        said = [process.communicate(timeout=1800) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), said
    found = {}
    for path in directory.glob("*.npz"):
        with np.load(path) as file:
            found[path.stem] = dict(file)
    return found


def pytest_generate_tests(metafunc):
    if "layout" in metafunc.fixturenames:
        metafunc.parametrize("layout", LONG if metafunc.config.getoption("--long") else SHORT)


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """The results of all layouts, and of the shaken runs."""
    long, directory = request.config.getoption("--long"), tmp_path_factory.mktemp("layouts")
    names, whole = (LONG, LONG) if long else (SHORT, WHOLE)
    process = begun("run_on_one_host", directory, ",".join(whole), *names, devices=8)
    return finished([process], directory)


def distances(one, other):
    """The largest difference of each array; of samples, in levels of 256."""
    return {name: np.abs(x - other[name].astype(np.float64)).max() for name, x in one.items()}


def assert_same(runs, arrays, label):
    """That all lies within a few times the distance of the shaken runs."""
    reference = runs["1_jit_1"]
    shaken = [distances(runs[name], reference) for name in SHAKEN]
    found = distances(arrays, reference)
    if "samples" in arrays:  # They agree but where one lies between two levels.
        assert found.pop("samples") <= 1
        assert (arrays["samples"] != reference["samples"]).mean() < 0.002
    ratios = {}
    for name, distance in found.items():
        unit = np.spacing(np.abs(reference[name]).max())  # Less than one in the last place is none.
        ratios[name] = distance / max(unit, *(each[name] for each in shaken))
    worst = max(ratios, key=ratios.get)
    print(f"{label}: {ratios[worst]:.2f} of the measured distance at {worst}")
    assert ratios[worst] <= WITHIN, (label, worst, ratios[worst])


@pytest.mark.slow
def test_every_layout_gives_the_numbers_of_one_device(runs, layout):
    assert_same(runs, runs[layout], layout)


@pytest.mark.slow
def test_rounding_alone_moves_little(runs):
    """What the layouts are measured by is itself as small as float32's rounding lets one hope."""
    reference = runs["1_jit_1"]
    for name in SHAKEN:
        for array, distance in distances(runs[name], reference).items():
            assert distance <= (1 if array == "samples" else 1e-4), (name, array, distance)


@pytest.mark.long
@pytest.mark.parametrize("hosts", (2, 4))
def test_several_hosts_give_the_numbers_of_one_device(runs, tmp_path, hosts):
    """Of two devices each; fsdp's also evaluate."""
    names = f"{2 * hosts}_pmap_1", f"{2 * hosts}_fsdp_2"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        begun("run_on_hosts", tmp_path, names[1], port, hosts, index, *names, devices=2)
        for index in range(hosts)
    ]
    found = finished(processes, tmp_path)
    for name in names:
        assert_same(runs, found[name], f"{hosts} hosts, {name}")


@pytest.mark.long
def test_a_run_goes_on_in_another_mode_on_other_devices(tmp_path):
    """By the command line: its checkpoints are those of every layout."""

    def go(directory, devices, mode, steps, microbatches=1):
        settings = {"train__steps": steps, "train__checkpoint_every": 10}
        settings |= {"parallel__mode": mode, "parallel__microbatches": microbatches}
        process = start(arguments(tmp_path / directory, **settings), devices)
        assert process.wait(timeout=600) == 0, process.communicate()

    go("whole", 1, "jit", 30)
    go("moved", 4, "fsdp", 10)
    go("moved", 2, "pmap", 20, microbatches=2)
    go("moved", 1, "jit", 30)
    go("fsdp", 4, "fsdp", 30)
    go("again", 4, "fsdp", 10)
    go("again", 4, "fsdp", 30)
    whole, _ = final_state(tmp_path / "whole")
    for name in ("moved", "fsdp"):
        found, step = final_state(tmp_path / name)
        assert step == 30
        for leaf, value in found.items():
            np.testing.assert_allclose(value, whole[leaf], rtol=0, atol=1e-5, err_msg=leaf)
    assert_equal_states(final_state(tmp_path / "again")[0], final_state(tmp_path / "fsdp")[0])


@pytest.mark.parametrize("mode", MODES)
def test_fsdp_splits_a_leaf_along_its_largest_axis_that_divides(mode):
    layout = Layout(mode, jax.sharding.AbstractMesh((8,), (AXIS,)))
    wanted = {  # Of each shape, that of a device's part.
        (): (),
        (3,): (3,),
        (128,): (16,),
        (3, 3, 64, 128): (3, 3, 64, 16),
        (16, 20): (2, 20),
        (24, 16): (3, 16),
        (4, 2): (4, 2),
    }
    for shape, part in wanted.items():
        sharding = layout.state(jax.ShapeDtypeStruct(shape, jnp.float32))
        assert sharding.shard_shape(shape) == (part if mode == "fsdp" else shape)


@pytest.mark.parametrize("mode", MODES)
def test_the_state_is_overwritten_where_it_lies(mode):
    def call(state, images, axis_name=None):
        total = images.astype(jnp.float32).sum()
        return 2 * state + (jax.lax.psum(total, axis_name) if axis_name else total), total

    def place(x):
        return [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]

    layout = make_layout(mode)
    state = jax.jit(lambda: jnp.arange(1000.0), out_shardings=layout.replicated)()
    images, before = from_host(np.ones((1, 8, 2), np.uint8), layout.split(1)), place(state)
    new, _ = compile_call(layout, call, layout.replicated)(state, images)
    assert state.is_deleted() and place(new) == before
    np.testing.assert_array_equal(new, 2 * np.arange(1000.0) + 16)


def test_memory_is_counted_by_parts_and_the_state_is_overwritten():
    job = make_job(small_config("pmap"))
    count = sum(leaf.size for leaf in jax.tree.leaves(job.abstract.params))
    needs = check.memory(job)
    counters = 4 * 2  # Adam's own and its schedule's, int32.
    assert (needs.params, needs.ema_params) == (4 * count, 4 * count)
    assert needs.optimizer == 8 * count + counters
    assert needs.images == BATCH * 8 * 8
    assert needs.reused == 16 * count + counters + 4  # And the step's number.
    assert needs.temporary > 4 * count  # The gradients at least.
    assert needs.total == 16 * count + counters + needs.images + needs.temporary


def test_the_table_of_memory_has_each_mode_with_and_without_remat(monkeypatch, tmp_path):
    mine, mib, asked = tmp_path / "mine.py", 2**20, []
    needs = check.Memory(1 * mib, 2 * mib, 3 * mib, 4 * mib, 1500 * mib, 6 * mib)
    monkeypatch.setattr(memory, "memory", lambda job, _: asked.append(job.task.model) or needs)
    lines = "import test_layouts", "def get_config(variants):", "    return test_layouts.again()"
    mine.write_text("\n".join(lines))
    rows = memory.table([str(mine), "digits"], jax.devices(), lambda line: None).splitlines()[2:]
    numbers = "| 1.0 | 2.0 | 3.0 | 1,500.0 | 1,510.0 |"
    wanted = [
        f"| {name} | {mode} | {remat} | {images} {numbers}"
        for name, remat, images in ((mine, "no", 32), (mine, "yes", 32), ("digits", "no", 64))
        for mode in memory.MODES
    ]
    assert rows == wanted
    assert [model.remat for model in asked] == [False] * 3 + [True] * 3 + [False] * 3
    with pytest.raises(RequestError, match=r"no file configs/digit\.py"):
        memory.table(["digit"], jax.devices(), print)


def again():
    """A small config that recomputes on the way back."""
    config = small_config()
    config.parallel.remat = True
    return config
