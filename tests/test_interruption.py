"""Signals and hangs, in processes of their own."""

import signal
import subprocess
import sys

import pytest
from runs_for_tests import ROOT

PATIENCE = 60.0  # Seconds for what comes at once.
BEGIN = "import sys, time; from ddpm_jax.interruption import Watch, sigterm_as_ctrl_c\n"
# Half a minute or more within C, where Python hears no signal.
IN_C = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**8)"


def started(code):
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "up\n", process.communicate()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_also_where_python_cannot_act(number):
    """As while XLA compiles. The first one is heard and nothing else."""
    process = started(f"import hashlib\nwith Watch(): print('up', flush=True); {IN_C}")
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, errors
    assert errors.strip().splitlines()[-1] == "stopped at once; the same command goes on"


def told_twice(end):
    """A process that has had two signals, and meets the second one by `end`."""
    code = f"""
with Watch() as watch:
    print("up", flush=True)
    try:
        while not watch.asked():
            time.sleep(0.01)
        print("asked", flush=True)
        time.sleep(600)
    {end}
"""
    process = started(code)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    return process


def test_a_second_signal_is_ctrl_c_where_python_can():
    process = told_twice("except KeyboardInterrupt: print('ctrl-c', flush=True)")
    out, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, "ctrl-c\n"), errors


def test_a_second_signal_does_not_wait_for_what_is_open():
    """As a checkpoint on its way to a slow disk, which is waited for when it is closed."""
    process = told_twice("finally: time.sleep(600)")
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    assert errors.strip().splitlines()[-1] == "stopped at once; the same command goes on"


def test_listeners_hear_the_first_signal_while_python_cannot():
    code = f"""
import hashlib, os
with Watch() as watch:
    watch.listeners.append(lambda: os.write(1, b"heard\\n"))
    print("up", flush=True)
    {IN_C}
"""
    process = started(code)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "heard\n"
    process.kill()
    assert process.communicate()[0] == ""


def test_a_second_signal_that_something_has_swallowed_counts_all_the_same():
    code = """
import signal
with Watch() as watch:
    print("up", flush=True)
    signal.raise_signal(signal.SIGTERM)
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        pass  # As what is raised in a callback of C.
    try:
        watch.asked()
    except KeyboardInterrupt:
        sys.exit(7)
"""
    assert started(code).wait(PATIENCE) == 7


def test_sigterm_is_ctrl_c_where_nobody_watches():
    code = """
with sigterm_as_ctrl_c():
    try:
        print("up", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("ctrl-c", flush=True)
"""
    process = started(code)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, "ctrl-c\n"), errors


def test_what_stands_still_shows_where_and_ends():
    code = """
def stuck_here():
    time.sleep(600)

with Watch(hang_seconds=1.0, doing=lambda: "waiting for images") as watch:
    for _ in range(30):  # It moves for longer than that first.
        watch.asked()
        time.sleep(0.05)
    print("up", flush=True)
    stuck_here()
"""
    process = started(code)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    assert "in stuck_here" in errors  # Its stack.
    message = errors.strip().splitlines()[-1]
    assert message == (
        "nothing has moved for 1 s (see parallel.hang_seconds) while waiting for images; the same "
        "command goes on"
    )


def test_what_lets_no_thread_run_ends_as_well():
    code = """
import ctypes
from ddpm_jax import interruption
interruption.STUCK_SECONDS = 1.0
def stuck_here():
    ctypes.PyDLL(None).sleep(600)

with Watch(hang_seconds=1.0) as watch:
    watch.asked()
    print("up", flush=True)
    time.sleep(0.5)
    stuck_here()
"""
    process = started(code)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "in stuck_here" in errors


def test_a_signal_when_all_is_done_is_no_error():
    """While Python lets go of what it has, where others' handlers would show a traceback."""
    code = """
import atexit, runpy
from ddpm_jax.training import check
check.report = lambda config: "up"
atexit.register(lambda: (print("ending", flush=True), time.sleep(600)))
sys.argv[1:] = ["--mode=check", "--config=configs/digits.py"]
runpy.run_module("ddpm_jax.main", run_name="__main__", alter_sys=True)
"""
    process = started(code)
    assert process.stdout.readline() == "ending\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and not errors


def test_a_watch_that_is_closed_leaves_signals_as_they_were():
    code = """
import signal
before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
for _ in range(300):
    with Watch() as watch:
        with Watch() as inner:
            assert not inner.asked()
assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
assert signal.set_wakeup_fd(-1) == -1
import os
time.sleep(0.2)  # For the last thread.
assert len(os.listdir("/proc/self/fd")) < 50
print("up", flush=True)
"""
    process = started(code)
    assert process.wait(PATIENCE) == 0
