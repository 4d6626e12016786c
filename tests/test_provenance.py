"""What a run notes of each of its starts."""

import json
import subprocess
import sys

import jax
import pytest
from etils import epath
from runs_for_tests import train

from ddpm_jax.evaluation.manifest import code_commit
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
    assert RunDirectory.of(tmp_path).load_starts() == starts


@pytest.mark.parametrize("content", ["{", "{}", "[1]", b"\xff"])
def test_a_damaged_note_is_begun_anew(tmp_path, content):
    directory = RunDirectory(epath.Path(tmp_path))
    directory.provenance.write_bytes(content if isinstance(content, bytes) else content.encode())
    directory.note_start(7)
    assert [start["from_step"] for start in directory.load_starts()] == [7]
    assert [path.name for path in tmp_path.iterdir()] == ["provenance.json"]


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
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert code_commit(package) == commit
    (tmp_path / "beside.txt").write_text("")
    assert code_commit(package) == commit
    (package / "__init__.py").write_text("a = 2\n")
    assert code_commit(package) == commit + "-dirty"


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_commit() is None
