"""Several hosts: how they meet, agree, stop together, and end when one of them is gone."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import pytest
from runs_for_tests import ROOT

from ddpm_jax import hosts, session
from ddpm_jax.config import RequestError
from ddpm_jax.hosts import Place
from ddpm_jax.training.pace import Pace

PATIENCE = 60.0  # Seconds for what comes at once.


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_threads(calls):
    """What each call returns or raises."""
    found = [None] * len(calls)

    def work(k):
        try:
            found[k] = calls[k]()
        except Exception as error:
            found[k] = error

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    return found


def meeting(places, seconds):
    return in_threads([lambda place=place: hosts.meet(place, seconds) for place in places])


# Meeting.


def test_all_meet_whoever_comes_first_and_strangers_do_not_matter():
    address = f"127.0.0.1:{free_port()}"
    places = [Place(address, 4, k) for k in range(4)]

    def stranger():
        while True:
            try:
                heard = b""
                for said in (b"GET / HTTP/1.1\r\n\n", b'{"problem": "x"}\n', b"[" * 5000):
                    with socket.create_connection(("127.0.0.1", int(address[10:]))) as it:
                        it.sendall(said)
                        with contextlib.suppress(ConnectionResetError):
                            heard += it.recv(10)
                return heard
            except ConnectionRefusedError:
                time.sleep(0.01)

    calls = [lambda place=place: hosts.meet(place, PATIENCE) for place in reversed(places)]
    found = in_threads([stranger, *calls[:3], lambda: time.sleep(0.5) or calls[3]()])
    assert found == [b"", None, None, None, None]


def test_everybody_hears_who_has_not_come():
    address = f"127.0.0.1:{free_port()}"
    found = meeting([Place(address, 4, 0), Place(address, 4, 2)], 1.0)
    assert all(isinstance(error, session.AbsentError) for error in found)
    assert str(found[0]) == str(found[1])
    assert "of 4 processes, number 1, 3 have not come to process 0" in str(found[0])


def greeted(place, index):
    """The connection of a process that has greeted process 0."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            it = socket.create_connection(("127.0.0.1", int(place.coordinator[10:])))
            it.sendall(json.dumps({"index": index, "count": place.count}).encode() + b"\n")
            return it
        time.sleep(0.01)


def problem(it):
    """What process 0 answers."""
    return json.loads(it.makefile().readline())["problem"]


def test_two_with_one_number_are_both_told():
    place = Place(f"127.0.0.1:{free_port()}", 3, 0)

    def twice():
        with greeted(place, 1) as first, greeted(place, 1) as second:
            return [problem(first), problem(second)]

    error, told = in_threads([lambda: hosts.meet(place, PATIENCE), twice])
    assert isinstance(error, RequestError) and told == [str(error)] * 2
    assert "two processes have --process_id=1" in told[0]


def test_one_that_has_gone_may_come_again():
    place = Place(f"127.0.0.1:{free_port()}", 3, 0)

    def again():
        with greeted(place, 1):
            time.sleep(0.1)  # Process 0 waits for the next one.
        with greeted(place, 1) as second, greeted(place, 2) as third:
            return [problem(second), problem(third)]

    assert in_threads([lambda: hosts.meet(place, PATIENCE), again]) == [None, ["", ""]]


def test_without_process_0_the_others_say_so():
    (found,) = meeting([Place(f"127.0.0.1:{free_port()}", 2, 1)], 0.3)
    assert isinstance(found, session.AbsentError)
    assert "cannot be reached within 0.3 s (this is process 1 of 2)" in str(found)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ((3, 1), "has --num_processes=3, process 0 has 2"),
        ((2, 0), "have --process_id=0"),
        ((2, 5), "process 5 on"),
        ((2, -1), "process -1 on"),
    ],
)
def test_who_does_not_belong_to_the_run_is_refused(other, text):
    address = f"127.0.0.1:{free_port()}"
    greeting = json.dumps({"index": other[1], "count": other[0]}).encode() + b"\n"

    def odd():
        while True:
            try:
                with socket.create_connection(("127.0.0.1", int(address[10:]))) as it:
                    it.sendall(greeting)
                    return json.loads(it.makefile().readline())["problem"]
            except ConnectionRefusedError:
                time.sleep(0.01)

    found = in_threads([lambda: hosts.meet(Place(address, 2, 0), PATIENCE), odd])
    assert isinstance(found[0], RequestError) and text in str(found[0])


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (found,) = meeting([Place(f"127.0.0.1:{port}", 2, 0)], 0.3)
    assert isinstance(found, session.AbsentError) and f"cannot listen at port {port}" in str(found)


# Finding.

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "node[03-05,9]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


def test_slurm_says_where_its_hosts_are(monkeypatch):
    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    place = hosts.find(None, None, None, None, 10)
    assert (place.count, place.index, place.local_devices) == (4, 2, [0])
    assert place.coordinator.startswith("node03:")
    assert hosts.find(None, None, None, False, 10) is None  # --no-distributed


def test_open_mpi_says_where_its_hosts_are(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1:34911")
    for key, value in {"WORLD_SIZE": "2", "WORLD_RANK": "1", "WORLD_LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(f"OMPI_COMM_{key}", value)
    place = hosts.find(None, None, None, None, 10)
    assert (place.count, place.index, place.local_devices) == (2, 1, [1])
    assert place.coordinator.startswith("10.96.0.1:")


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, False),  # A script of sbatch, say.
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_who_is_one_of_several(environment, several):
    assert hosts.is_one_of_several(environment) == several


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("a:1", None, None, None), "belong together"),
        (("a:1", 2, 2, None), "must be from 0 to 1"),
        (("nowhere", 2, 0, None), "expected HOST:PORT"),
        (("a:²", 2, 0, None), "expected HOST:PORT"),
        (("::1:1234", 2, 0, None), "expected HOST:PORT"),
        (("a:1", 0, 0, None), "at least 1"),
        ((None, None, None, True), "no cluster is found"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flags, text, monkeypatch):
    for key in SLURM:
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(RequestError, match=text) as caught:
        hosts.find(*flags, 10)
    assert "\n" not in str(caught.value)


def test_a_process_has_its_nodes_devices_where_it_is_alone_there_or_is_told(monkeypatch):
    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x4)")
    assert hosts.find(None, None, None, None, 10).local_devices is None
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "8(x4)")
    assert hosts.find(None, None, None, None, 10).local_devices == [0]
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "2,3")
    assert hosts.find(None, None, None, None, 10).local_devices == [2, 3]


def test_a_tpu_machine_that_says_nothing_of_others_goes_on_alone(monkeypatch, capsys):
    for key in SLURM:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(hosts.clusters.cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    assert hosts.find(None, None, None, None, 1) is None
    assert "going on alone" in capsys.readouterr().out
    with pytest.raises(RequestError, match="--no-distributed"):
        hosts.find(None, None, None, True, 1)


@pytest.mark.parametrize("limits", [(0, 60), (300, 1), (float("nan"), 60), (300, float("inf"))])
def test_limits_that_end_healthy_runs_or_none_are_refused(limits):
    with pytest.raises(RequestError, match="_seconds="):
        hosts.check_limits(*limits)


def test_more_hosts_need_longer_limits():
    """Each of 512 tells every 16 s: refused before anybody is waited for."""
    with pytest.raises(RequestError, match=r"--host_seconds=47: at least 48, .* of 512 processes"):
        hosts.join(Place("nowhere.invalid:1", 512, 1), 1, 47)
    hosts.check_limits(1, 48, 512)
    hosts.check_limits(1, 3, 32)


# Agreeing.


class Store:
    """JAX's coordination service, within this process."""

    def __init__(self, count):
        self._values, self._lock, self._count = {}, threading.Lock(), count
        self._barriers = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        with self._lock:
            assert allow_overwrite or key not in self._values
            self._values[key] = value

    def key_value_dir_get(self, prefix):
        with self._lock:
            return [(k, v) for k, v in self._values.items() if k.startswith(prefix)]

    def key_value_try_get(self, key):
        if key not in self._values:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self._values[key]

    def wait_at_barrier(self, name, milliseconds):
        with self._lock:
            barrier = self._barriers.setdefault(name, threading.Barrier(self._count))
        try:
            barrier.wait(milliseconds / 1000)
        except threading.BrokenBarrierError:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED") from None


@pytest.fixture
def sessions():
    """Makes the sessions of `count` processes, which end by being listed in `.ended`."""
    made = []

    def make(count, host_seconds=PATIENCE):
        store, ended = Store(count), [[] for _ in range(count)]
        made.extend(
            session.Session(store, k, count, host_seconds, PATIENCE, 0.02, ended[k].append)
            for k in range(count)
        )
        return types.SimpleNamespace(all=made[-count:], ended=ended)

    yield make
    for one in made:
        one._closed.set()
        one._hurry.set()


def test_who_asks_for_something_else_is_named(sessions):
    one, other = sessions(2).all
    calls = [lambda: one.gather("training", 1), lambda: other.gather("sampling", 1)]
    for error in in_threads(calls):
        assert isinstance(error, RequestError)
        assert "not started alike: 'sampling' on process 1, 'training' on process 0" in str(error)


def test_values_of_all_are_gathered_in_order(sessions):
    all_of_them = sessions(3).all
    for n in range(2):
        calls = [lambda s=s, n=n: s.gather("testing", [s.index, n], PATIENCE) for s in all_of_them]
        assert in_threads(calls) == [[[0, n], [1, n], [2, n]]] * 3


def test_who_does_not_come_to_an_agreement_is_named(sessions):
    first, _, third = sessions(3).all
    found = in_threads([lambda s=s: s.gather("reading", 1, 0.3) for s in (first, third)])
    for error in found:
        assert isinstance(error, session.AbsentError)
        assert str(error).startswith("reading: not all hosts have come within 0.3 s: process 1; ")


def test_facts_that_differ_are_named_with_their_host(sessions, monkeypatch):
    both = sessions(2).all
    in_threads([one.introduce for one in both])
    current = threading.local()
    monkeypatch.setattr(session, "current", lambda: current.session)
    facts = {"seed": 1, "name": "digits", "steps": 10}

    def agree(one, **changes):
        current.session = one
        session.agree("their config", facts | changes)

    assert in_threads([lambda: agree(both[0]), lambda: agree(both[1])]) == [None, None]
    found = in_threads([lambda: agree(both[0]), lambda: agree(both[1], seed=2, steps=20)])
    for error in found:
        assert isinstance(error, RequestError)
        name = socket.gethostname()
        assert str(error) == (
            f"the hosts differ in their config: seed is 2 on process 1 on {name}, 1 on process 0 "
            f"on {name}; steps is 20 on process 1 on {name}, 10 on process 0 on {name}"
        )


@pytest.mark.parametrize("asked_of", [[0], [2], [0, 1, 2]])
def test_all_stop_at_the_same_question(sessions, asked_of):
    """Whoever is asked, however far the others are: nobody goes past the question agreed on."""
    threes = sessions(3).all

    def ask(one):
        for question in range(100_000):
            if one.asked(one.index in asked_of and question >= 5 + one.index):
                assert one.asked(False)  # And so it stays.
                return question
            time.sleep(0.001 * one.index)
        return None

    found = in_threads([lambda s=s: ask(s) for s in threes])
    assert found[0] is not None and found == [found[0]] * 3


def test_one_that_fails_ends_the_others_with_its_reason(sessions, capsys, monkeypatch):
    monkeypatch.setattr(session, "GRACE_SECONDS", 0.1)
    three = sessions(3)
    in_threads([one.introduce for one in three.all])
    three.all[1].leave(2, "its disk is full")
    wait_until(lambda: all(three.ended))
    assert [codes[0] for codes in three.ended] == [2, 2, 2]
    errors = capsys.readouterr().err
    assert "process 1 on" in errors and "has stopped: its disk is full" in errors


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (jax.errors.JaxRuntimeError("INTERNAL: Gloo all-reduce failed: Connection closed"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (ConnectionError("Connection refused"), False),
        (ValueError("ABORTED"), False),
    ],
)
def test_an_error_of_ones_own_is_told_at_once(sessions, monkeypatch, error, waits):
    one, _ = sessions(2).all
    slept = []
    clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=slept.append)
    monkeypatch.setattr(session, "time", clock)
    one.await_verdict(error)
    assert slept == ([PATIENCE + 2 * session.GRACE_SECONDS] if waits else [])


def test_one_that_has_ended_in_good_order_is_not_missed(sessions):
    two = sessions(2, host_seconds=0.4)
    closing = threading.Thread(target=two.all[1].close)
    closing.start()
    assert two.all[0].gather("ending", None) == [None, None]  # They wait for each other.
    closing.join(PATIENCE)
    time.sleep(1.0)
    assert two.ended == [[], []]


def test_each_knows_how_long_the_others_have_waited_for_their_images(sessions):
    two = sessions(2).all
    two[0].waited, two[1].waited = lambda: 1.5, lambda: 20.0
    wait_until(lambda: two[0].waits() == {0: 1.5, 1: 20.0})


def test_the_host_that_holds_the_others_up_is_in_each_line(sessions, monkeypatch):
    """Both take as long as the slower one; the faster one waits for it where devices do."""
    clocks = [types.SimpleNamespace(awaited=awaited) for awaited in (5.0, 0.0)]
    paces = [Pace(clock, 2) for clock in clocks]
    for seconds in (0.2, 0.4, 1.2):
        for clock, pace, own in zip(clocks, paces, (0.1, 0.15), strict=True):
            clock.awaited += seconds - own
            pace.took(seconds)  # Of two steps.
    two = sessions(2).all
    monkeypatch.setattr(session, "current", lambda: two[1])
    line = paces[1].scalars()
    assert line == pytest.approx(
        {"time/step_median": 0.2, "time/step_max": 0.6, "time/host_median": 0.075}
        | {"time/host_median_host": 1}
    )
    wait_until(lambda: two[0]._heard[1][0].pace)
    monkeypatch.setattr(session, "current", lambda: two[0])
    assert paces[0].scalars() == pytest.approx(line)
    assert paces[0].scalars() == {}  # There were no steps.
    monkeypatch.setattr(session, "current", lambda: None)
    clocks[0].awaited = 0.0
    with paces[0].awaiting():
        time.sleep(0.01)
    assert clocks[0].awaited >= 0.01
    paces[0].took(0.2)
    line = paces[0].scalars()
    assert line["time/step_max"] == 0.1 and "time/host_median_host" not in line


def wait_until(true):
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Processes.

LOOP = """
import sys, time
from ddpm_jax import hosts, main, session
from ddpm_jax.interruption import Interrupted, Watch

def work():
    place = hosts.Place(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    hosts.join(place, 60, float(sys.argv[4])).doing = lambda: "turning round"
    with Watch() as watch:
        print("up", flush=True)
        for question in range(10**6):
            if watch.asked():
                raise Interrupted(f"stopped at {question}")
            if question == 20 and sys.argv[5] == f"fail{place.index}":
                raise ConnectionError("Connection lost: a cable is loose")
            time.sleep(0.02)

sys.exit(main.reported(work))
"""


def start_hosts(count, host_seconds, mode="", args=()):
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOOP, address, str(count), str(k), str(host_seconds), mode],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(count)
    ]
    for process in processes:
        assert "up" in process.stdout.readline(), process.communicate()
    return processes


def ended(processes, seconds=PATIENCE):
    found = [process.communicate(timeout=seconds) for process in processes]
    return [process.returncode for process in processes], [errors for _, errors in found]


def test_signals_stop_all_processes_and_a_second_one_at_once():
    processes = start_hosts(2, 60)
    processes[1].send_signal(signal.SIGINT)
    codes, errors = ended(processes)
    assert codes == [75, 75], errors
    stops = [text.strip().splitlines()[-1] for text in errors]
    assert stops[0] == stops[1] and stops[0].startswith("stopped at ")
    processes = start_hosts(2, 60)
    os.kill(processes[0].pid, signal.SIGSTOP)  # It cannot agree to stop.
    processes[1].send_signal(signal.SIGTERM)
    assert "SIGTERM: finishing" in processes[1].stderr.readline() + processes[1].stderr.readline()
    processes[1].send_signal(signal.SIGTERM)
    assert processes[1].wait(PATIENCE) == 75
    os.kill(processes[0].pid, signal.SIGCONT)
    codes, errors = ended(processes)
    assert codes == [75, 75] and "stopped at once" in errors[0], errors


def test_hosts_that_fall_silent_are_named_and_end_the_others():
    processes = start_hosts(4, 4)
    os.kill(processes[1].pid, signal.SIGKILL)
    os.kill(processes[2].pid, signal.SIGSTOP)
    codes, errors = ended([processes[0], processes[3]])
    assert codes == [75, 75], errors
    for text in errors:
        named = re.findall(r"process (\d) on \S+ \(last (?:starting|turning round)\)", text)
        assert named and set(named) <= {"1", "2"}, text
        assert "not been heard of for 4 s; the same command goes on" in text
    processes[2].kill()


@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.long), 1])
def test_an_error_on_one_host_ends_the_others_with_its_reason(failing):
    """Long before either would miss the other, or JAX its good-bye."""
    codes, errors = ended(start_hosts(2, 600, f"fail{failing}"), 30)
    assert codes == [1, 1], errors
    assert f"process {failing} on" in errors[1 - failing]
    assert "has stopped: ConnectionError: Connection lost: a cable is" in errors[1 - failing]
    assert "Traceback" in errors[failing] and "a cable is loose" in errors[failing]


@pytest.mark.long
def test_process_0_that_freezes_is_named_and_one_that_is_killed_ends_the_others():
    processes = start_hosts(2, 4)
    os.kill(processes[0].pid, signal.SIGSTOP)
    code, (error,) = ended(processes[1:])
    assert code == [75] and "error: process 0 on" in error, error
    assert "has not been heard of for 4 s" in error
    processes[0].kill()
    processes = start_hosts(2, 60)
    processes[0].kill()
    assert ended(processes[1:])[0] == [-signal.SIGABRT]  # By JAX, at once.
