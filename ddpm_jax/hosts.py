"""How the processes of a run on several hosts find each other, and who is missing if they do not.

On Slurm, under Open MPI and on TPU pods the cluster says where process 0 is, how many there are and
which one this is; elsewhere three flags do. They meet at process 0 before JAX's runtime starts
there: that one can neither wait for a stated time nor say who has not come.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence

import jax
from jax._src import clusters, distributed

from ddpm_jax import session
from ddpm_jax.config import RequestError

LONGEST = 4096  # Bytes of a greeting.
AGAIN_SECONDS = 0.2  # Between two attempts to reach process 0.
GREETING_SECONDS = 2.0  # For a greeting: whoever is slower may be anybody.
JOIN_SECONDS = 60  # For JAX's own runtime, when all have met.
GREETING = {"index": int, "count": int}
ANSWER = {"problem": str, "again": bool}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run.

    Attributes:
      coordinator: HOST:PORT, where process 0 listens.
      count, index: how many there are, and which one this is.
      local_devices: the ids of this process's devices; None: all that it sees.
    """

    coordinator: str
    count: int
    index: int
    local_devices: Sequence[int] | None = None


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether a cluster has started this process as one of several.

    A Slurm job of many tasks whose script runs a single program is no such thing, so it is the
    step's number of tasks that counts.
    """
    for key in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"):
        if environment.get(key, "").isdigit() and int(environment[key]) > 1:
            return True
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def find(
    coordinator: str | None,
    count: int | None,
    index: int | None,
    distributed_flag: bool | None,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> Place | None:
    """The place of this process; None where it is alone.

    Args:
      coordinator, count, index: the flags, all or none.
      distributed_flag: True: there are others; False: there are none; None: see the environment.
      seconds: for the cluster to answer.
      environment: of the process, unless given.
    Raises:
      RequestError: some flags without the others, or out of range; no cluster is found.
    """
    named = (coordinator, count, index)
    if named != (None, None, None):
        if None in named:
            raise RequestError("--coordinator, --num_processes and --process_id belong together")
        _check(coordinator, count, index)
        return Place(*named)
    environment = os.environ if environment is None else environment
    named_by_cluster = is_one_of_several(environment)
    # A TPU virtual machine, of one host or more: its metadata server knows.
    perhaps = clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm
    wanted = (named_by_cluster or perhaps) if distributed_flag is None else distributed_flag
    if not wanted:
        return None
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, round(seconds)
        )
        problem = "" if None not in found[:3] else "Slurm, Open MPI and TPU pods are known"
    except (ImportError, OSError, RuntimeError, ValueError, KeyError) as error:
        problem = str(error).splitlines()[0] if str(error) else repr(error)
    if problem and distributed_flag is None and not named_by_cluster:
        print(f"this TPU machine says nothing of others ({problem}): going on alone", flush=True)
        return None
    if problem:
        raise RequestError(
            f"no cluster is found ({problem}); name it with --coordinator=HOST:PORT "
            "--num_processes=N --process_id=K, or go on alone with --no-distributed"
        )
    return Place(*found[:3], _local_devices(found[3], environment))


def _local_devices(
    found: Sequence[int] | None, environment: Mapping[str, str]
) -> Sequence[int] | None:
    """A device for each process of a node, unless the user names them or it is the only one."""
    if named := environment.get("JAX_LOCAL_DEVICE_IDS"):
        return [int(word) for word in named.split(",")]
    on_node = (
        environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")
        or re.match(r"\d*", environment.get("SLURM_STEP_TASKS_PER_NODE", "")).group()
    )
    return None if on_node == "1" else found


def _check(coordinator: str, count: int, index: int) -> None:
    host, _, port = coordinator.rpartition(":")
    known = port.isascii() and port.isdecimal() and 0 < int(port) < 65536
    if not host or not known or (":" in host and not (host[0] == "[" and host[-1] == "]")):
        raise RequestError(
            f"--coordinator={coordinator}: expected HOST:PORT, e.g. 10.0.0.1:1234 or [fe80::1]:1234"
        )
    if count < 1:
        raise RequestError(f"--num_processes={count}: at least 1")
    if not 0 <= index < count:
        raise RequestError(
            f"--process_id={index}: must be from 0 to {count - 1} with --num_processes={count}"
        )


def check_limits(startup_seconds: float, host_seconds: float, count: int = 1) -> None:
    """Refuses limits under which healthy processes end, or none ever does.

    Args:
      count: how many processes there are, at least.
    Raises:
      RequestError: names the flag.
    """
    if not 1 <= startup_seconds < math.inf:
        raise RequestError(f"--startup_seconds={startup_seconds:g}: at least 1, and finite")
    beat = session.beat(count)
    if not 3 * beat <= host_seconds < math.inf:
        whose = "each process" if count == 1 else f"each of {count} processes"
        raise RequestError(
            f"--host_seconds={host_seconds:g}: at least {3 * beat:g}, and finite: {whose} tells "
            f"every {beat:g} s that it lives"
        )


def join(place: Place, seconds: float, host_seconds: float) -> session.Session:
    """Meets the others and starts JAX's runtime and the session; before any device is touched.

    Args:
      seconds: for all to come.
      host_seconds: how long a process may be silent before the others end.
    Raises:
      AbsentError: not all have come.
      RequestError: they do not belong together, or are too many for these limits.
    """
    check_limits(seconds, host_seconds, place.count)
    meet(place, seconds)
    # Signals are heard by `interruption.Watch`: JAX's notice hides the second one.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            place.local_devices,
            cluster_detection_method="deactivate",  # It is all known.
            initialization_timeout=JOIN_SECONDS,
            # JAX ends the process without a name; the session, which knows it, comes first.
            heartbeat_timeout_seconds=round(2 * host_seconds) + 10,
            shutdown_timeout_seconds=JOIN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"the hosts cannot be joined: {reason}") from error
    client = distributed.global_state.client
    return session.begin(client, place.index, place.count, host_seconds, seconds)


def meet(place: Place, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
    """Returns when all processes have come to process 0.

    Raises, in all that came, the same:
      AbsentError: who has not come within `seconds`.
      RequestError: who does not belong to the run.
    """
    deadline = now() + seconds
    if place.index:
        _greet(place, seconds, deadline, now)
    else:
        _receive(place, seconds, deadline, now)


def _receive(place: Place, seconds: float, deadline: float, now: Callable[[], float]) -> None:
    """Process 0's part: it hears all greetings, and answers them all alike."""
    there: dict[int, socket.socket] = {}
    heard: list[socket.socket] = []  # Of two with one number as well.
    problem, again = "", False
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(place, seconds, deadline, now))
        listener.settimeout(AGAIN_SECONDS)
        while not problem:
            there = {k: connection for k, connection in there.items() if _is_open(connection)}
            missing = [str(k) for k in range(1, place.count) if k not in there]
            if not missing:
                break
            if now() > deadline:
                have, again = "has" if len(missing) == 1 else "have", True
                problem = (
                    f"of {place.count} processes, number {', '.join(missing)} {have} not come to "
                    f"process 0 at {place.coordinator} within {seconds:g} s; start all of them, "
                    "or see --num_processes and --startup_seconds"
                )
                break
            try:
                connection, address = listener.accept()
            except TimeoutError:
                continue
            stack.enter_context(connection)
            greeting = _read(connection, now, GREETING, GREETING_SECONDS)
            if greeting is None:  # Somebody else's.
                connection.close()
                continue
            index, count = greeting["index"], greeting["count"]
            if count != place.count or not 0 <= index < count:
                problem = (
                    f"process {index} on {address[0]} has --num_processes={count}, process 0 has "
                    f"{place.count}"
                )
            elif index == 0 or (index in there and _is_open(there[index])):
                problem = f"two processes have --process_id={index}, one of them on {address[0]}"
            there[index] = connection
            heard.append(connection)
        for connection in heard:
            with contextlib.suppress(OSError):
                answer = {"problem": problem, "again": again}
                connection.sendall(json.dumps(answer).encode() + b"\n")
    if problem:
        raise (session.AbsentError if again else RequestError)(problem)


def _listener(
    place: Place, seconds: float, deadline: float, now: Callable[[], float]
) -> socket.socket:
    """Listens at the coordinator's port on all addresses, as JAX's runtime will."""
    port = int(place.coordinator.rpartition(":")[2])
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=place.count
                )
            return socket.create_server(("", port), backlog=place.count)
        except OSError as error:  # Perhaps of a job that is just ending.
            if now() > deadline:
                raise session.AbsentError(
                    f"process 0 cannot listen at port {port} within {seconds:g} s: "
                    f"{error.strerror or error}; choose another --coordinator"
                ) from error
            time.sleep(AGAIN_SECONDS)


def _greet(place: Place, seconds: float, deadline: float, now: Callable[[], float]) -> None:
    """The part of all others: they come, and wait for the answer."""
    host, _, port = place.coordinator.rpartition(":")
    greeting = json.dumps({"index": place.index, "count": place.count}).encode() + b"\n"
    reached = False
    while now() < deadline + 2 * AGAIN_SECONDS:
        try:
            address = host.strip("[]"), int(port)
            with socket.create_connection(address, GREETING_SECONDS) as connection:
                connection.sendall(greeting)
                reached = True
                # Process 0 answers when all have come, at its own deadline at the latest.
                answer = _read(connection, now, ANSWER, seconds + JOIN_SECONDS)
        except OSError:
            answer = None
        if answer is None:  # Not there yet, or what listens is still an earlier run.
            time.sleep(AGAIN_SECONDS)
            continue
        if answer["problem"]:
            raise (session.AbsentError if answer["again"] else RequestError)(answer["problem"])
        return
    said = "has not let this one in" if reached else "cannot be reached"
    raise session.AbsentError(
        f"process 0 at {place.coordinator} {said} within {seconds:g} s (this is process "
        f"{place.index} of {place.count}); is it running, and is the address right?"
    )


def _is_open(connection: socket.socket) -> bool:
    """Whether the other side still waits: it may have died and come again."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        connection.setblocking(True)


def _read(
    connection: socket.socket,
    now: Callable[[], float],
    fields: Mapping[str, type],
    seconds: float,
) -> dict | None:
    """A line of JSON with these fields, within so many seconds; None if something else comes."""
    deadline, received = now() + seconds, b""
    try:
        while not received.endswith(b"\n"):
            connection.settimeout(max(deadline - now(), 0.001))
            part = connection.recv(LONGEST)
            received += part
            if not part or len(received) > LONGEST or now() > deadline:
                return None
        message = json.loads(received)
    except (OSError, ValueError, RecursionError):
        return None
    fits = isinstance(message, dict) and message.keys() == fields.keys()
    return message if fits and all(type(message[k]) is kind for k, kind in fields.items()) else None
