"""Checkpoints damaged in every way that a disk, or somebody's hand, can damage them.

Restoring gives the newest one right to the bit, or says that it cannot be read and gives the one
before, right to the bit: whatever happened, and never anything else. What is right is what the
training handed to be saved, copied then.
"""

import json
import shutil
import types
import zlib

import jax
import numpy as np
import pytest
from runs_for_tests import train

from ddpm_jax import runs
from ddpm_jax.training.checkpoints import CheckpointError, Checkpoints
from ddpm_jax.training.job import make_job

OLDEST, OLDER, NEWEST = 4, 8, 12


def bits(state):
    """The bytes of each leaf, by its place."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run's checkpoints: where, of which job, and what was saved: (leaves, notes) by step."""
    workdir, saved = tmp_path_factory.mktemp("corruptions"), {}
    save = Checkpoints.save

    def saving(self, step, state, notes):
        saved[step] = bits(state), json.loads(json.dumps(notes))
        save(self, step, state, notes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", saving)
        settings = {"train__steps": NEWEST, "train__checkpoint_every": OLDEST}
        assert train(workdir, **settings) == 0
    assert list(saved) == [OLDEST, OLDER, NEWEST]
    assert all(notes["window"] for _, notes in saved.values())  # There is something to damage.
    directory = runs.RunDirectory.of(workdir)
    job = make_job(directory.load_config())
    return types.SimpleNamespace(path=workdir / "checkpoints", job=job, saved=saved)


def files_of(directory):
    """The files of a checkpoint, in an order that does not depend on their random names."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: (path.parts[:-1], path.stat().st_size, path.name))


# Each damages the newest checkpoint in `top`: one of its files (`victim`), or all of it.


def flip(top, victim, rng):
    content = bytearray(victim.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    victim.write_bytes(content)


def blank(top, victim, rng):
    """A piece of zeros, as file systems leave after a power cut."""
    content = bytearray(victim.read_bytes())
    start = rng.integers(len(content))
    length = min(len(content) - start, int(rng.integers(1, 4097)))
    content[start : start + length] = bytes(length)
    victim.write_bytes(content)


def truncate(top, victim, rng):
    content = victim.read_bytes()
    victim.write_bytes(content[: rng.integers(len(content))])


def empty(top, victim, rng):
    victim.write_bytes(b"")


def lengthen(top, victim, rng):
    victim.write_bytes(victim.read_bytes() + rng.bytes(int(rng.integers(1, 100))))


def remove(top, victim, rng):
    victim.unlink()


def replace_by_a_directory(top, victim, rng):
    victim.unlink()
    victim.mkdir()


def replace_by_the_older_ones(top, victim, rng):
    """The same file, or one of its kind where names are drawn by chance."""
    place = victim.relative_to(top / str(NEWEST)).parent
    others = [p for p in files_of(top / str(OLDER)) if p.parent == top / str(OLDER) / place]
    named = [p for p in others if p.name == victim.name]
    shutil.copyfile(named[0] if named else others[rng.integers(len(others))], victim)


OF_A_FILE = (
    flip,
    blank,
    truncate,
    empty,
    lengthen,
    remove,
    replace_by_a_directory,
    replace_by_the_older_ones,
)


def remove_a_directory(top, victim, rng):
    inner = sorted(path for path in (top / str(NEWEST)).rglob("*") if path.is_dir())
    shutil.rmtree(inner[rng.integers(len(inner))])


def empty_the_step(top, victim, rng):
    shutil.rmtree(top / str(NEWEST))
    (top / str(NEWEST)).mkdir()


def make_the_step_a_file(top, victim, rng):
    shutil.rmtree(top / str(NEWEST))
    (top / str(NEWEST)).write_bytes(rng.bytes(100))


def spoil_the_metadata(top, victim, rng):
    """No JSON, other JSON, or JSON of wrong types, in any of the files that hold JSON."""
    texts = ["{", "", "null", "[]", "7", '"text"', "{}", '{"checksums": {}, "notes": {}}']
    texts += ['{"checksums": [1], "notes": null}', "[" * 100_000, '{"a": {"b": [1e999, NaN]}}']
    named = ["meta/metadata", "state/_METADATA", "_CHECKPOINT_METADATA", "state/_sharding"]
    path = top / str(NEWEST) / named[rng.integers(len(named))]
    path.write_text(texts[rng.integers(len(texts))])


def change_the_types(top, victim, rng):
    """One value of the metadata becomes another kind of thing."""
    path = top / str(NEWEST) / "meta/metadata"
    content = json.loads(path.read_text())
    spots = [(content, key) for key in content]
    spots += [
        (inner, key) for inner in content.values() if isinstance(inner, dict) for key in inner
    ]
    spots += [(content["notes"]["window"], key) for key in content["notes"]["window"]]
    where, key = spots[rng.integers(len(spots))]
    others = [None, True, -1, 1.5, "text", [], {}, [{}]]
    where[key] = others[rng.integers(len(others))]
    path.write_text(json.dumps(content))


def take_the_metadata_of_another_step(top, victim, rng):
    other = top / str((OLDEST, OLDER)[rng.integers(2)])
    shutil.copyfile(other / "meta/metadata", top / str(NEWEST) / "meta/metadata")


def take_the_notes_of_another_step(top, victim, rng):
    path = top / str(NEWEST) / "meta/metadata"
    theirs = json.loads((top / str(OLDER) / "meta/metadata").read_text())
    content = json.loads(path.read_text()) | {"notes": theirs["notes"]}
    path.write_text(json.dumps(content))


def take_all_of_another_step(top, victim, rng):
    shutil.rmtree(top / str(NEWEST))
    shutil.copytree(top / str((OLDEST, OLDER)[rng.integers(2)]), top / str(NEWEST))


def take_the_state_of_another_step(top, victim, rng):
    shutil.rmtree(top / str(NEWEST) / "state")
    shutil.copytree(top / str(OLDER) / "state", top / str(NEWEST) / "state")


OF_THE_WHOLE = (
    remove_a_directory,
    empty_the_step,
    make_the_step_a_file,
    spoil_the_metadata,
    change_the_types,
    take_the_metadata_of_another_step,
    take_the_notes_of_another_step,
    take_all_of_another_step,
    take_the_state_of_another_step,
)


def leave_an_unfinished_save(top, victim, rng):
    """As a kill leaves it, of a later step or of this one."""
    step = NEWEST + int(rng.integers(2))
    left = top / f"{step}.orbax-checkpoint-tmp{'-1700000000' if rng.integers(2) else ''}"
    shutil.copytree(top / str(NEWEST), left)
    files = files_of(left)
    for path in files[: rng.integers(len(files))]:
        path.unlink()


def leave_other_things(top, victim, rng):
    names = [
        "13.damaged",
        "notes.txt",
        "0x20",
        "-3",
        "1e3",
        "latest",
        "99999999999999999999",
        "007",
    ]
    path = top / names[rng.integers(len(names))]
    if rng.integers(2):
        path.mkdir()
    else:
        path.write_text("12")


BESIDE = (leave_an_unfinished_save, leave_other_things)

KINDS = {kind.__name__: kind for kind in (*OF_A_FILE, *OF_THE_WHOLE, *BESIDE)}


def pytest_generate_tests(metafunc):
    if "number" not in metafunc.fixturenames:
        return
    long = metafunc.config.getoption("--long")
    cases = []
    for name, kind in KINDS.items():
        # A checkpoint has some 15 files, each of which is hit by each in the long form.
        many = 20 if kind in OF_A_FILE else 8
        short = 2 if kind in OF_A_FILE else 1
        cases += [(name, number) for number in range(many if long else short)]
    metafunc.parametrize(("kind", "number"), cases)


def restored(sound, top, warn):
    checkpoints = Checkpoints(top)
    try:
        return checkpoints.restore(sound.job.abstract, warn=warn)
    finally:
        checkpoints.close()


def contents(top):
    return {path: path.read_bytes() if path.is_file() else None for path in top.rglob("*")}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads.
def test_the_newest_or_the_one_before_is_restored_to_the_bit(sound, tmp_path, tally, kind, number):
    seed = zlib.crc32(kind.encode())
    rng = np.random.default_rng([seed, number])
    top = shutil.copytree(sound.path, tmp_path / "checkpoints")
    files = files_of(top / str(NEWEST))
    victim = files[(seed + number) % len(files)]
    KINDS[kind](top, victim, rng)
    before, said = contents(top), []
    state, step, notes = restored(sound, top, said.append)
    what = f"{kind} of {victim.relative_to(top)}" if KINDS[kind] in OF_A_FILE else kind
    print(f"{what}: step {step}; {said}")
    tally("corruptions")
    if step == OLDER:
        tally("corruptions passed over")
    leaves, noted = sound.saved[step]
    assert bits(state) == leaves
    assert notes == noted
    assert step in (OLDER, NEWEST)
    if step == OLDER and (top / str(NEWEST)).is_dir():
        (line,) = said
        assert line.startswith(f"checkpoint {NEWEST} cannot be read and is passed over: ")
        assert "\n" not in line and len(line) < 400
    else:
        assert not said
    assert contents(top) == before  # Nothing is deleted, and nothing written.


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["truncate", "empty_the_step", "spoil", "flip"])
def test_no_whole_checkpoint_is_said_in_a_line(sound, tmp_path, tally, kind):
    rng = np.random.default_rng(0)
    top = shutil.copytree(sound.path, tmp_path / "checkpoints")
    for step in (OLDEST, OLDER, NEWEST):
        data = [path for path in files_of(top / str(step)) if path.parent.name == "d"]
        if kind == "empty_the_step":
            shutil.rmtree(top / str(step))
            (top / str(step)).mkdir()
        elif kind == "spoil":
            (top / str(step) / "meta/metadata").write_text("{}")
        else:  # All of any size: some of them hold older versions of a node.
            for path in [path for path in data if path.stat().st_size > 5000]:
                KINDS[kind](top, path, rng)
    before, said = contents(top), []
    with pytest.raises(CheckpointError) as caught:
        restored(sound, top, said.append)
    tally("corruptions")
    assert str(caught.value) == (
        f"none of the checkpoints {[NEWEST, OLDER, OLDEST]} in {top} can be read whole"
    )
    assert len(said) == 3
    assert contents(top) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_second_signal_while_reading_is_not_taken_for_damage(sound, monkeypatch):
    """Orbax makes an ordinary error of the KeyboardInterrupt."""
    from orbax.checkpoint._src.serialization import serialization

    async def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(serialization, "_read_shard", interrupted)
    said = []
    with pytest.raises(KeyboardInterrupt):
        restored(sound, sound.path, said.append)
    assert not said
