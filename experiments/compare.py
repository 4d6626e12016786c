"""Results of --mode=evaluate beside each other, if they were measured alike.

    python -m experiments.compare runs/a runs/b
    python -m experiments.compare runs/a/evaluation/step….json runs/b/evaluation/step….json
    python -m experiments.compare runs/a runs/b --allow=parameters --metric=bits_per_dim_test

A run stands for its results, the newest of each name. Results of one name are compared; where their
protocols differ, nothing is compared, and the differences are named. --allow=KEY lets a key of the
protocol differ, --anyway all of them; the table then says in which they do, as it does where the
same quantity was estimated in another way (seed, terms, draws). Beside each value is its difference
from the first, with the error that it has if the two errors are independent.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from etils import epath

from ddpm_jax import files
from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import manifest
from ddpm_jax.evaluation.manifest import Manifest
from ddpm_jax.runs import RunDirectory


def read(argument: str) -> dict[str, Manifest]:
    """The results that an argument stands for, by name: a manifest's own, or a run's newest.

    Raises:
      RequestError: neither a manifest nor a run that has been evaluated.
    """
    path = epath.Path(argument).expanduser()
    try:
        if path.is_file():
            found = [manifest.load(path)]
        else:
            there = files.matching(RunDirectory.of(path).evaluation, "step*.json")
            found = [manifest.load(p) for p in there]
    except ValueError as error:
        raise RequestError(str(error)) from error
    if not found:
        raise RequestError(
            f"{argument}: no results there; run ddpm_jax.main --mode=evaluate --workdir={argument}"
        )
    found.sort(key=lambda m: (m.subject["checkpoint"], m.provenance["time"]))
    newest = {m.name: m for m in found}
    return {name: newest[name] for name in sorted(newest, key=lambda n: (n.split("_")[-1], n))}


def compare(
    results: dict[str, dict[str, Manifest]], allowed: Sequence[str] = (), anyway: bool = False
) -> str:
    """A Markdown table of results: {label: {name: manifest}}.

    Raises:
      RequestError: protocols differ in what is not allowed, or there is no common name.
    """
    first, *others = results
    common = [name for name in results[first] if all(name in results[o] for o in others)]
    if not common:
        listing = "; ".join(f"{label} has {', '.join(found)}" for label, found in results.items())
        raise RequestError(f"no result is in all of them: {listing}")
    lines = ["| result | run | step | value | less the first |", "|---|---|---|---|---|"]
    for name in common:
        one = results[first][name]
        noted = {}
        for label in others:
            differing = manifest.differences(
                one.measured.protocol, results[label][name].measured.protocol
            )
            for key, (a, b) in differing.items():
                if not anyway and key not in allowed and key.split(".")[0] not in allowed:
                    raise RequestError(
                        f"{name} was not measured alike: {key} is {a} in {first}, {b} in {label}; "
                        f"measure again, or --allow={key}, or --anyway"
                    )
                noted.setdefault(label, []).append(f"{key}: {b}, not {a}")
            estimators = one.measured.estimator, results[label][name].measured.estimator
            for key, (a, b) in manifest.differences(*estimators).items():
                noted.setdefault(label, []).append(f"{key}: {b}, not {a}")
        for label in results:
            lines.append(_row(name, label, results[label][name], one, noted.get(label, [])))
    return "\n".join(lines)


def _row(name: str, label: str, m: Manifest, first: Manifest, notes: list[str]) -> str:
    difference = ""
    if m is not first:
        errors = [x.measured.standard_error for x in (m, first)]
        change = float(m.measured) - float(first.measured)
        error = math.hypot(*errors) if None not in errors else None
        difference = manifest.Measured(change, error).text()
    text = m.measured.text() + "".join(f"; {note}" for note in notes)
    return f"| {name} | {label} | {m.subject['checkpoint']} | {text} | {difference} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code: 0, or 2 where there is none."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", help="runs, or manifests of their evaluation/")
    parser.add_argument("--metric", action="append", help="only results of this name; repeatable")
    parser.add_argument("--allow", action="append", default=[], help="a key that may differ")
    parser.add_argument("--anyway", action="store_true", help="whatever differs")
    args = parser.parse_args(argv)
    try:
        results = {}
        for argument in dict.fromkeys(a.rstrip("/") for a in args.results):
            found = read(argument)
            chosen = {n: m for n, m in found.items() if not args.metric or n in args.metric}
            if not chosen:
                raise RequestError(f"{argument} has no such result; it has {', '.join(found)}")
            results[argument] = chosen
        if len(results) < 2:
            raise RequestError("name at least two different results to compare")
        print(compare(results, args.allow, args.anyway))
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
