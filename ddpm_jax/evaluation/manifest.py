"""A number with its protocol: what was measured, on what, how, and with what error.

A manifest is one JSON file. `protocol` is what must be equal for two numbers to stand beside each
other (data, split, n, features, sampler, steps, clip, which parameters, what chose the checkpoint);
`estimator` how the same quantity was estimated (seed, draws); `subject` whose number it is.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import pathlib
import platform
import shlex
import subprocess
import sys
import types
import zlib
from typing import Any

import jax
from etils import epath

import ddpm_jax
from ddpm_jax import bounded, files

# Of a manifest's file, and the types of their values.
FIELDS = {
    "name": str,
    "value": (int, float),
    "standard_error": (int, float, types.NoneType),
    "unit": str,
    "better": str,
    "protocol": dict,
    "estimator": dict,
    "details": dict,
    "subject": dict,
    "provenance": dict,
}
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


class Measured(float):
    """A number that knows its error: a float with what belongs to it.

    Attributes:
      standard_error: in the number's unit; None where it is unknown.
      unit: e.g. "bits/dim"; "" for a pure number.
      better: "lower", "higher", or "" where neither is.
      protocol, estimator: see the module; JSON-able.
      details: further numbers by name.
    """

    standard_error: float | None
    unit: str
    better: str
    protocol: dict[str, Any]
    estimator: dict[str, Any]
    details: dict[str, Any]

    def __new__(
        cls,
        value: float,
        standard_error: float | None = None,
        unit: str = "",
        better: str = "",
        protocol: dict[str, Any] | None = None,
        estimator: dict[str, Any] | None = None,
        details: dict[str, Any] | None = None,
    ) -> Measured:
        measured = super().__new__(cls, value)
        measured.standard_error, measured.unit, measured.better = standard_error, unit, better
        measured.protocol, measured.estimator = protocol or {}, estimator or {}
        measured.details = details or {}
        return measured

    def text(self) -> str:
        """The number to the digits that its error leaves it, e.g. "4.480 ± 0.021 bits/dim"."""
        error = self.standard_error
        if not error or not math.isfinite(error):
            shown = f"{float(self):.6g}"
        elif abs(self) < 1e-4 and error < 1e-4:
            shown = f"{float(self):.3g} ± {error:.2g}"
        else:
            digits = max(0, 1 - int(f"{error:e}".partition("e")[2]))
            shown = f"{float(self):.{digits}f} ± {error:.{digits}f}"
        return f"{shown} {self.unit}".rstrip()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A saved result. `subject`: the run's name, config, checkpoint and parameters' checksum."""

    name: str
    measured: Measured
    subject: dict[str, Any]
    provenance: dict[str, Any]


def digest(*parts: Any) -> str:
    """Eight hexadecimal digits that tell JSON-able things from others."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def provenance(seconds: float | None = None) -> dict[str, Any]:
    """Versions, devices and time of a measurement that ends now, and the seconds it took."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    versions |= {"ddpm_jax": ddpm_jax.__version__, "python": platform.python_version()}
    return {
        "versions": versions,
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "hosts": jax.process_count(),
        "seconds": seconds if seconds is None else round(seconds, 1),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def start_provenance(step: int) -> dict[str, Any]:
    """What a training that goes on from `step` runs with: versions, devices, commit, command."""
    started = provenance()
    del started["seconds"]
    return {
        "from_step": step,
        **started,
        "commit": code_commit(),
        "command": shlex.join(sys.orig_argv),
    }


def code_commit(folder: pathlib.Path = pathlib.Path(__file__).parents[1]) -> str | None:
    """The git commit that a package's code is of, with "-dirty" where its files differ from it.

    New files count, unless git ignores them; files beside the package's folder do not.

    None where git does not keep the package: it was installed, or there is no git.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, encoding="utf-8", timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=all", "--", ".")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def source_digest(folder: pathlib.Path = pathlib.Path(__file__).parents[1]) -> str:
    """CRC-32 of a package's Python files, in the order of their paths, as hexadecimal."""
    crc = 0
    for path in sorted(folder.rglob("*.py")):
        crc = zlib.crc32(str(path.relative_to(folder)).encode() + path.read_bytes(), crc)
    return f"{crc:08x}"


def save(path: epath.Path, manifest: Manifest) -> None:
    """Writes a manifest, whole or not at all."""
    m = manifest.measured
    content = {
        "name": manifest.name,
        "value": float(m),
        "standard_error": m.standard_error,
        "unit": m.unit,
        "better": m.better,
        "protocol": m.protocol,
        "estimator": m.estimator,
        "details": m.details,
        "subject": manifest.subject,
        "provenance": manifest.provenance,
    }
    files.replace(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load(path: epath.PathLike) -> Manifest:
    """The manifest in a file.

    Raises:
      ValueError: it is not one.
    """
    path = epath.Path(path)
    try:
        content = bounded.read_json(path)
        for field, kind in FIELDS.items():
            if not isinstance(content[field], kind):
                raise TypeError(f"{field} is {content[field]!r}")
        measured = Measured(*(content[field] for field in list(FIELDS)[1:8]))
        subject, provenance = content["subject"], content["provenance"]
        if not isinstance(subject["checkpoint"], int) or not isinstance(provenance["time"], str):
            raise TypeError("no step, or no time")
        return Manifest(content["name"], measured, subject, provenance)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result's manifest: {error!r}") from error


def differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: (value, other value)} of what differs; None stands for what is missing."""
    found = {}
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found
