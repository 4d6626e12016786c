"""What a run notes of each of its starts."""

import importlib.metadata
import json
import subprocess
import sys

import jax
import pytest
from etils import epath
from runs_for_tests import train

import ddpm_jax
from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import manifest
from ddpm_jax.evaluation.manifest import Manifest, Measured, code_commit
from ddpm_jax.runs import RunDirectory


def test_each_start_is_noted_with_the_step_from_which_it_goes_on(tmp_path):
    assert train(tmp_path, train__steps=10) == 0
    assert train(tmp_path, train__steps=20) == 0
    starts = json.loads((tmp_path / "provenance.json").read_text())
    assert [start["from_step"] for start in starts] == [0, 10]
    for start in starts:
        assert start["versions"]["jax"] == jax.__version__
        assert (start["devices"], start["hosts"]) == ("1 cpu", 1)
        assert sys.orig_argv[-1] in start["command"]
        assert start["time"].endswith("+00:00")
    assert train(tmp_path, train__steps=20) == 0  # Nothing is left to train.
    assert RunDirectory.of(tmp_path).load_starts() == starts


def test_a_checkout_that_is_not_installed_tells_its_version(monkeypatch):
    installed = manifest.importlib.metadata.version

    def version(package):
        if package == "ddpm_jax":
            raise importlib.metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(manifest.importlib.metadata, "version", version)
    assert manifest.provenance()["versions"]["ddpm_jax"] == ddpm_jax.__version__


@pytest.mark.parametrize("content", [b"{", b"{}", b"[1]", b'[{"versions": ["jax"]}]', b"\xff"])
def test_a_damaged_note_is_kept_and_another_begun(tmp_path, content):
    directory = RunDirectory(epath.Path(tmp_path))
    directory.provenance.write_bytes(content)
    with pytest.raises(RequestError, match="damaged"):
        directory.load_starts()
    directory.note_start(7)
    assert [start["from_step"] for start in directory.load_starts()] == [7]
    assert (tmp_path / "provenance.json.damaged").read_bytes() == content


def test_notes_that_cannot_be_read_now_are_not_overwritten(tmp_path, monkeypatch):
    directory = RunDirectory(epath.Path(tmp_path))
    directory.note_start(0)
    before = directory.provenance.read_bytes()

    def busy(path):
        raise OSError(f"{path} cannot be read now")

    with monkeypatch.context() as patch:
        patch.setattr(type(directory.provenance), "read_bytes", busy)
        with pytest.raises(OSError, match="now"):
            directory.note_start(10)
    assert directory.provenance.read_bytes() == before


def git(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e@x")
    command = ["git", "-C", folder, *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_of_the_package_and_says_whether_files_differ(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    assert code_commit(package) is None  # No git checkout.
    git(tmp_path, "init", "-q")
    assert code_commit(package) is None  # A checkout of something else, with the package inside.
    (tmp_path / "README").write_text("\n")
    git(tmp_path, "add", "package", "README")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert code_commit(package) == commit
    (tmp_path / "README").write_text("edited\n")
    (tmp_path / "beside.py").write_text("")
    assert code_commit(package) == commit
    (package / "__init__.py").write_text("a = 2\n")
    assert code_commit(package) == commit + "-dirty"
    (package / "__init__.py").write_text("a = 1\n")
    (package / "new.py").write_text("")  # It may have been imported.
    assert code_commit(package) == commit + "-dirty"
    (tmp_path / ".gitignore").write_text("new.py\n")
    assert code_commit(package) == commit


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("subject", {"checkpoint": None}), ("provenance", {"time": 3}), ("protocol", [])),
        *(("standard_error", "0.1"), ("value", "4"), ("name", None), ("details", [])),
    ],
)
def test_a_manifest_of_other_types_is_none(tmp_path, field, value):
    path = epath.Path(tmp_path) / "m.json"
    kept = Manifest("n", Measured(4, 0.1), {"checkpoint": 3}, {"time": "2026"})
    manifest.save(path, kept)
    assert manifest.load(path) == kept
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=r"not a result's manifest"):
        manifest.load(path)


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_commit() is None
