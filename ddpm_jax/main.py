"""The one entry point: python -m ddpm_jax.main --config=FILE.py[:variants] --workdir=DIR.

Exit codes: 0 done; 2 the request is wrong (one line says why, nothing was started); 75 interrupted,
the same command goes on; 1 anything else.
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
import ml_collections

from ddpm_jax import config as config_lib
from ddpm_jax import generation, hosts, interruption, runs, session
from ddpm_jax.config import RequestError
from ddpm_jax.data import ReadError
from ddpm_jax.evaluation import manifest, results, selftest
from ddpm_jax.lock import LostError
from ddpm_jax.training import check, goodput, loop, together, verify
from ddpm_jax.training.checkpoints import CheckpointError
from ddpm_jax.training.metrics import NonFiniteError

MODES = ("train", "sample", "evaluate", "check", "verify")


class Parser(argparse.ArgumentParser):
    """Raises RequestError where argparse would exit."""

    def error(self, message: str) -> None:
        raise RequestError(message)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """The flags, and the overrides (dotted key, text) of `--config.key=value`.

    Raises:
      RequestError: an unknown flag or a missing value.
    """
    parser = Parser(
        prog="python -m ddpm_jax.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="config keys, each set by --config.KEY=VALUE:\n"
        + "\n".join(f"  {k} ({f.default}): {f.meaning}" for k, f in config_lib.FIELDS.items()),
    )
    parser.add_argument("--config", help="a file of configs/, with variants after a colon")
    parser.add_argument("--workdir", help="the run's directory")
    parser.add_argument("--mode", default="train", choices=MODES)
    parser.add_argument(
        "--seeds",
        help="such as 0,1,2: train these together, each in a run directory of its own, whose name "
        "has the seed in the place of {seed} in --workdir",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="with --mode=train: go on under another config, or with other images, than before",
    )
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="with --mode=evaluate: do weights and data give FID and IS as published? (CIFAR-10)",
    )
    add_host_flags(parser)
    known, rest = parser.parse_known_args(argv)
    return known, config_lib.parse_overrides(rest)


def add_host_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `join_hosts` reads."""
    parser.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="whether this is one of several processes; unless given, Slurm, Open MPI and TPU "
        "pods say so themselves",
    )
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, on other clusters")
    parser.add_argument("--num_processes", type=int, help="with --coordinator: how many there are")
    parser.add_argument("--process_id", type=int, help="with --coordinator: which one this is")
    parser.add_argument(
        "--startup_seconds", type=float, default=300, help="for all processes to come (%(default)s)"
    )
    parser.add_argument(
        "--host_seconds",
        type=float,
        default=60,
        help="how long a process may be silent before the others end (%(default)s)",
    )


def resolve(
    args: argparse.Namespace, overrides: Sequence[tuple[str, str]]
) -> ml_collections.ConfigDict:
    """The valid config of a request: the file's, or else the run's own, with the overrides.

    A self-test, which is of no run, takes the default one.

    Raises:
      RequestError: see `config.validate`; or the request names neither.
    """
    if args.config:
        config = config_lib.load_file(args.config)
    elif args.workdir:
        workdir = args.workdir
        if args.seeds is not None:  # They differ in the seed alone.
            workdir = together.workdir_of(workdir, together.parse_seeds(args.seeds)[0])
        config = runs.RunDirectory.of(workdir).load_config()
    elif args.selftest:
        config = config_lib.default_config()
    else:
        raise RequestError("--config=FILE is needed, e.g. --config=configs/digits.py")
    for key, value in overrides:
        config_lib.override(config, key, value)
    config_lib.validate(config)
    return config


def main(argv: Sequence[str] | None = None, started: float | None = None) -> int:
    """Runs a request; returns the exit code.

    Args:
      argv: its arguments; those of the program, unless given.
      started: the monotonic time when the process began.
    """
    for stream in (sys.stdout, sys.stderr):  # A terminal may know neither × nor the paths' letters.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return reported(lambda: _run(sys.argv[1:] if argv is None else argv, started))


def _run(argv: Sequence[str], started: float | None) -> int:
    args, overrides = parse(argv)
    join_hosts(args)
    virtual = args.mode == "verify" and verify.use_several_cpu_devices(os.environ)
    if args.seeds is not None:
        _check_seeds(args, overrides)
    config = resolve(args, overrides)
    if args.selftest and args.mode != "evaluate":
        raise RequestError("--selftest belongs to --mode=evaluate")
    if args.mode != "check" and not args.selftest and not args.workdir:
        raise RequestError("--workdir=DIR is needed, e.g. --workdir=runs/digits")
    use_compilation_cache()
    if args.mode in ("sample", "evaluate") and not args.selftest:
        limit = goodput.PATIENCE * config.parallel.hang_seconds
        with interruption.Watch(limit, lambda: f"in --mode={args.mode}"):
            _use(args, config)
    elif args.seeds is not None:
        seeds = together.parse_seeds(args.seeds)
        together.train_together(
            config, args.workdir, seeds, _say, force=args.force, started=started
        )
    elif args.mode == "train":
        loop.train(config, args.workdir, _say, args.force, started)
    elif args.selftest:
        return 0 if selftest.run(config, _say) else 1
    elif args.mode == "verify":
        devices = jax.devices()[:1] if virtual else None
        return 0 if verify.verify(config, args.workdir, _say, devices) else 1
    else:
        _say(check.report(config))
    return 0


def _use(args: argparse.Namespace, config: ml_collections.ConfigDict) -> None:
    """--mode=sample and --mode=evaluate.

    Raises:
      RequestError: no run there, another config, or no disk that the hosts have in common.
    """
    directory = runs.RunDirectory.of(args.workdir)
    directory.check_shared()
    loop.check_config(config)
    if args.mode == "sample":
        run = runs.load(args.workdir, config=config)
        _say(f"samples: {generation.generate(run, directory.samples, _say)}")
    else:
        results.evaluate(results.load_for_evaluation(args.workdir, config), directory, _say)


def _check_seeds(args: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> None:
    """Refuses what --seeds does not go with.

    Raises:
      RequestError: names it.
    """
    if args.mode != "train" or args.selftest:
        raise RequestError("--seeds belongs to --mode=train; other modes take one run's --workdir")
    if "seed" in dict(overrides):
        raise RequestError("--seeds and --config.seed exclude each other; leave out --config.seed")


def reported(work: Callable[[], int]) -> int:
    """work() with every error that a user can meet said in one line; returns the exit code.

    On several hosts an error ends the process, and with it the others, which name this one.
    """
    # Orbax tells of every file, and of each error before it raises it; of leaves that cannot be
    # read it raises one's error, and asyncio tells of the others'.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    with interruption.sigterm_as_ctrl_c():
        code, message = _outcome(work)
        of_all = session.current()
        if of_all is not None:
            if message is None:
                of_all.close()
            else:
                of_all.leave(code, message)
    return code


def _outcome(work: Callable[[], int]) -> tuple[int, str | None]:
    """The exit code, and what went wrong; None where all hosts end alike."""
    try:
        return work(), None
    except RequestError as error:
        return _fail(error, 2)
    except session.AbsentError as error:
        return _fail(error, interruption.EXIT_CODE)
    except interruption.Interrupted as error:
        return _fail(error, interruption.EXIT_CODE)[0], None
    except KeyboardInterrupt:
        return _fail(interruption.AT_ONCE, interruption.EXIT_CODE)
    except (CheckpointError, LostError, NonFiniteError, ReadError) as error:
        return _fail(error, 1)
    except OSError as error:  # A disk that is full, or a place that is not to be written.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _unexpected(error)
        return _fail(": ".join(filter(None, (error.filename, error.strerror))), 1)
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> tuple[int, str]:
    """With other hosts around, an error must end them too, and may be the end of one of them."""
    of_all = session.current()
    if of_all is None:
        raise error
    of_all.await_verdict(error)
    traceback.print_exception(error)
    return 1, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def join_hosts(args: argparse.Namespace) -> None:
    """Joins the other processes, where there are any; before anything touches a device.

    Raises:
      RequestError: the flags are wrong or unlike those of the others, or no cluster is found.
      AbsentError: not all have come.
    """
    hosts.check_limits(args.startup_seconds, args.host_seconds)
    place = hosts.find(
        args.coordinator,
        args.num_processes,
        args.process_id,
        args.distributed,
        args.startup_seconds,
    )
    if place is not None and place.count > 1:
        of_all = hosts.join(place, args.startup_seconds, args.host_seconds)
        of_all.doing = lambda: f"in --mode={args.mode}"
        asked = {f"--{name}": getattr(args, name) for name in ("mode", "workdir", "seeds", "force")}
        session.agree("what they are to do", asked | {"the code": manifest.source_digest()})


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def _fail(error: Exception | str, code: int) -> tuple[int, str]:
    print(f"error: {error}" if code != interruption.EXIT_CODE else error, file=sys.stderr)
    return code, str(error)


def use_compilation_cache() -> None:
    """Keeps compiled programs in ~/.cache/ddpm_jax/xla, unless JAX_COMPILATION_CACHE_DIR is set."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path("~/.cache/ddpm_jax/xla").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
    exit_code = main(started=goodput.process_start())
    for number in interruption.SIGNALS:  # There is nothing left to stop, but an end to be hastened.
        signal.signal(number, lambda *_: os._exit(exit_code))
    if exit_code and session.current() is None:  # Threads of what was broken off have much to say.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
