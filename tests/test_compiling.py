"""How a step is compiled: with which options, how often, and what is left of it."""

import functools
import gc
import platform
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs_for_tests import ROOT, TINY

from ddpm_jax import config as config_lib
from ddpm_jax import parallel
from ddpm_jax.parallel import compile_call, make_layout
from ddpm_jax.training.job import make_job
from ddpm_jax.training.step import seeded_call


def test_the_compiler_s_options_are_those_of_its_version_and_the_user_s_go_first(monkeypatch):
    """That XLA takes them is seen by every test that compiles a step."""
    jax.devices()  # Before there are flags that XLA may not know.
    monkeypatch.setattr(parallel.jax, "jit", lambda function, **how: how)
    monkeypatch.setattr(parallel.jaxlib.version, "__version__", "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    ynn, passes = "xla_cpu_experimental_ynn_fusion_type", "xla_disable_hlo_passes"
    ours = {ynn: "LIBRARY_FUSION_TYPE_DOT", passes: "cse_barrier_expander"}
    want = {"compiler_options": ours, "donate_argnums": 0}
    assert parallel.network_jit(len, donate_argnums=0) == want
    monkeypatch.setenv("XLA_FLAGS", f"--{ynn}=eltwise")
    assert parallel.network_jit(len) == {"compiler_options": {passes: ours[passes]}}
    monkeypatch.setenv("XLA_FLAGS", f"--{ynn}=eltwise --{passes}=")
    assert parallel.network_jit(len) == {"compiler_options": {}}
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(parallel.jaxlib.version, "__version__", "0.12.0")
    assert parallel.network_jit(len) == {"compiler_options": {}}


@pytest.mark.parametrize(("channels", "wide"), [(32, False), (128, False), (136, True)])
def test_by_jaxlib_0_11_wide_networks_have_settings_of_their_own(monkeypatch, channels, wide):
    monkeypatch.setattr(parallel.jaxlib.version, "__version__", "0.11.2")
    monkeypatch.setenv("XLA_FLAGS", "")
    kernel = jnp.ones((3, 3, channels, channels))
    params = {"in": kernel[:, :, :3], "middle": kernel, "dense": jnp.ones((512, 512))}
    params["out"] = jnp.ones((3, 3, 512, 3))

    def total(params, x):
        return sum(leaf.sum() for leaf in jax.tree.leaves(params)) + x.sum()

    images = jnp.ones((2, 8, 8, 3))
    program = parallel.network_jit(total)
    want = total(params, images)
    np.testing.assert_allclose(program(params, images), want, rtol=1e-5)
    compiled = program.lower(params, images).compile()
    np.testing.assert_allclose(compiled(params, images), want, rtol=1e-5)

    narrow, other = mock.Mock(), mock.Mock()
    program = parallel._ByWidth(narrow, other)
    chosen = other if wide else narrow
    assert program(params, images) is chosen.return_value
    assert program.lower(params, jax.eval_shape(lambda: images)) is chosen.lower.return_value
    assert program(images) is other.return_value  # Nothing tells.
    with monkeypatch.context() as patched:
        patched.setattr(parallel.jax, "jit", lambda function, **how: how["compiler_options"])
        both = parallel.network_jit(len)
    ynn = "xla_cpu_experimental_ynn_fusion_type"
    assert (both.narrow, both.wide) == ({}, {ynn: "LIBRARY_FUSION_TYPE_DOT"})


def test_on_gpus_no_sum_s_order_is_left_to_chance(monkeypatch):
    monkeypatch.setattr(parallel.jax, "jit", lambda function, **how: how)
    monkeypatch.setattr(parallel.jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    option = "xla_gpu_exclude_nondeterministic_ops"
    assert parallel.network_jit(len) == {"compiler_options": {option: True}}
    monkeypatch.setenv("XLA_FLAGS", f"--{option}=false")
    assert parallel.network_jit(len) == {"compiler_options": {}}


def test_parts_are_apart_on_one_cpu_with_a_known_compiler_and_nowhere_else(monkeypatch):
    """Their values and gradients are what they are without."""
    x = jnp.linspace(0.0, 1.0, 5)

    def program():
        part = parallel.apart(lambda x, power: {"y": jnp.sin(x) ** power}, static_argnums=1)
        return jax.jit(jax.value_and_grad(lambda x: (2 * part(x, 3)["y"]).sum()))

    def calls():
        return program().lower(x).compile().as_text().count(" call(")

    value, gradient = program()(x)
    np.testing.assert_allclose(value, 2 * (np.sin(x) ** 3).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, 6 * np.sin(x) ** 2 * np.cos(x), rtol=1e-6)
    monkeypatch.setattr(parallel.jaxlib.version, "__version__", "0.10.2")
    assert calls() == 1
    monkeypatch.setattr(parallel.jaxlib.version, "__version__", "0.12.0")
    assert calls() == 0
    monkeypatch.setattr(parallel.jaxlib.version, "__version__", "0.10.2")
    with monkeypatch.context() as patched:
        patched.setattr(parallel.jax, "device_count", lambda: 2)
        assert calls() == 0
    monkeypatch.setattr(parallel.jax, "default_backend", lambda: "tpu")
    assert calls() == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_is_compiled_once_and_what_that_took_is_given_back_before_it_runs(
    monkeypatch, ahead
):
    events = []
    monkeypatch.setattr(parallel, "release_memory", lambda: events.append("released"))

    def call(state, images, axis_name=None):
        events.append("traced")
        jax.debug.callback(lambda: events.append("ran"))
        return state + images.sum(), images.max()

    layout = make_layout("jit", jax.devices()[:1])
    program = compile_call(layout, call, layout.replicated)
    state = jnp.zeros(())
    if ahead:
        images = jax.ShapeDtypeStruct((1, 4), jnp.float32, sharding=layout.split(1))
        program.prepare(jax.ShapeDtypeStruct((), state.dtype), images)
        assert events == ["traced", "released"]
    for _ in range(2):
        state, _ = program(state, jnp.ones((1, 4)))
        jax.effects_barrier()
    assert events == ["traced", "released", "ran", "ran"] and state == 8


def test_no_garbage_is_looked_for_while_a_step_is_traced(monkeypatch):
    looks = []

    def call(state, images, axis_name=None):
        looks.append(gc.isenabled())
        return state, images

    def fail(state, images, axis_name=None):
        raise ValueError("made")

    layout = make_layout("jit", jax.devices()[:1])
    shapes = jnp.zeros(()), jnp.ones((1, 4))
    compile_call(layout, call, layout.replicated).prepare(*shapes)
    assert looks == [False] and gc.isenabled()
    with pytest.raises(ValueError, match="made"):
        compile_call(layout, fail, layout.replicated).prepare(*shapes)
    assert gc.isenabled()
    gc.disable()
    try:
        with parallel.uncollected():
            pass
        assert not gc.isenabled()  # As it was before.
    finally:
        gc.enable()


def test_memory_that_was_freed_goes_back_to_the_system():
    """Small pieces, which glibc would keep; on other systems there is nothing to see."""
    code = """
import pathlib
from ddpm_jax.parallel import release_memory
def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
pieces = [bytes(1000) for _ in range(200_000)]
del pieces[::2], pieces[:-1]
before = resident()
release_memory()
assert before - resident() > 2**26, (before, resident())
"""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc keeps it")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_to_leave_an_update_out_needs_no_second_state():
    """As long as it is chosen leaf by leaf, where the update is made."""
    temporary = {}
    for nonfinite in ("stop", "skip"):
        config = config_lib.load_file(f"{ROOT}/configs/digits.py")
        changes = {"train.nonfinite": nonfinite, "train.batch_size": 2, "train.steps_per_call": 1}
        for key, value in (TINY | changes | {"model.channels": 64}).items():
            config_lib.override(config, key, value)
        job = make_job(config)
        step = functools.partial(seeded_call, job.task)
        program = compile_call(job.layout, step, (job.layout.replicated, job.sharding))
        seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=job.layout.replicated)
        compiled = program.lower((seed, job.abstract), job.images).compile()
        temporary[nonfinite] = compiled.memory_analysis().temp_size_in_bytes
    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(job.abstract.params))
    # The state has four times the parameters; chosen after the update they would be two more.
    assert temporary["skip"] < temporary["stop"] + 1.5 * parameters
