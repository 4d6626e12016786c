"""Lives of the program: each a process of its own, forked from one that has imported it already.

A start then costs what the run's own start does. Nothing of JAX is awake where the lives are forked
from: no device was touched there.
"""

import contextlib
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

TESTS = pathlib.Path(__file__).parents[1]
PATIENCE = 240.0  # Seconds for what comes at once.


class Nursery:
    """Starts lives and tells how they ended."""

    def __init__(self, log):
        """The process that they are forked from; what it says itself is in `log`."""
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(log, "w"),  # noqa: SIM115 (as long as the process lives)
            cwd=TESTS.parent,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)},
            text=True,
        )
        self._alive, self._codes = set(), {}

    def _ask(self, **request):
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        assert answer, f"somebody has ended the nursery: {self._process.wait()}"
        return json.loads(answer)

    def start(self, argv, log, devices=1, cache=None):
        """The process id of a new life.

        Args:
          argv: of `ddpm_jax.main`.
          log: the file for what it says, which it is added to.
          devices: how many virtual ones it has.
          cache: the directory of compiled programs, unless that of all tests.
        """
        cache = str(cache or os.environ["JAX_COMPILATION_CACHE_DIR"])
        pid = self._ask(argv=[*map(str, argv)], log=str(log), devices=devices, cache=cache)
        self._alive.add(pid)
        return pid

    def ended(self, pid, seconds=0.0):
        """The exit code, negative for a signal's; None if it still lives after so long."""
        if pid in self._alive:
            code = self._ask(pid=pid, seconds=seconds)
            if code is None:
                return None
            self._alive.discard(pid)
            self._codes[pid] = code
        return self._codes[pid]

    def exit_code(self, pid):
        """The same when it ends, which it must."""
        code = self.ended(pid, PATIENCE)
        assert code is not None, f"process {pid} does not end"
        return code

    def close(self):
        """Ends all."""
        if self._process.poll() is None:  # Else they may be others' processes by now.
            for pid in self._alive:
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def serve():
    """Answers requests, a line of JSON each; in the life itself, returns what it shall be."""
    from ddpm_jax import main  # noqa: F401 (which imports all the rest)

    # What was begun in the background has none.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        request = json.loads(line)
        if "argv" in request:
            answer = os.fork()
            if not answer:
                return request
        else:
            answer = wait(**request)
        print(json.dumps(answer), flush=True)
    return None


def live(argv, log, devices, cache):
    """The program itself, from here to its end."""
    import jax

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    update = jax.config.update

    def updated(name, value):
        # However quickly a program was compiled, the next life need not do it again.
        update(name, 0.0 if name == "jax_persistent_cache_min_compile_time_secs" else value)

    jax.config.update = updated
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", cache)
    sys.argv[1:] = argv
    del sys.modules["ddpm_jax.main"]
    runpy.run_module("ddpm_jax.main", run_name="__main__", alter_sys=True)


def wait(pid, seconds):
    """The exit code of a life, or None."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)


if __name__ == "__main__":
    if life := serve():
        live(**life)
