"""Sets of TensorFlow Datasets, prepared here, and CelebA-HQ both ways."""

import importlib.resources.abc
import io
import os
import pathlib
import re
import shlex
import shutil
import sys
import tarfile
import types

import numpy as np
import pytest
from PIL import Image
from sources_for_tests import everything, refusal

from ddpm_jax.config import load_file
from ddpm_jax.data import (
    RecordSource,
    open_source,
    records,
)

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def prepare(data_dir, set_name, features, examples):
    """Prepares a set as array_record, without TensorFlow: images must come as encoded files."""
    sys.modules.setdefault("importlib_resources", importlib.resources)  # TFDS does not declare it.
    import tensorflow_datasets as tfds

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features(tfds.features))
            )

        def _split_generators(self, _):
            return {"train": enumerate(examples()), "test": enumerate(examples()[:5])}

        def _generate_examples(self):
            raise NotImplementedError

    Made(data_dir=data_dir, file_format="array_record").download_and_prepare()


def encoded(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    return file


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds sets")
    flat = [np.full((6, 6), 10 * label, np.uint8) for label in range(20)]
    prepare(
        directory,
        "tiny",
        lambda f: {
            "image": f.Image(shape=(6, 6, 1)),
            "mask": f.Image(shape=(6, 6, 1)),
            "label": f.ClassLabel(num_classes=20),
        },
        lambda: [
            {"image": encoded(image), "mask": encoded(255 - image), "label": label}
            for label, image in enumerate(flat)
        ],
    )
    prepare(
        directory,
        "varied",
        lambda f: {"photo": f.Image(), "label": f.Text()},
        lambda: [
            {"photo": encoded(np.full((6 + n, 8, 3), n, np.uint8)), "label": "x"} for n in range(5)
        ],
    )
    prepare(
        directory,
        "oblong",
        lambda f: {"image": f.Image(shape=(4, 9, 1))},
        lambda: [{"image": encoded(np.zeros((4, 9), np.uint8))}],
    )
    prepare(
        directory,
        "broken",
        lambda f: {"image": f.Image(shape=(6, 6, 1))},
        lambda: [
            {"image": io.BytesIO(b"no image at all") if label == 13 else encoded(image)}
            for label, image in enumerate(flat)
        ],
    )
    prepare(
        directory,
        "pair",
        lambda f: {"left": f.Image(shape=(6, 6, 1)), "right": f.Image(shape=(6, 6, 1))},
        lambda: [{"left": encoded(image), "right": encoded(image)} for image in flat],
    )
    return directory


@pytest.fixture
def tiny(config, tfds_dir):
    config.data.update(name="tiny", data_dir=str(tfds_dir), image_size=6, channels=1)
    return config


@pytest.mark.parametrize("kept", [None, "resident_bytes", "cache_bytes"])
def test_tfds_set(tiny, kept, caplog, capfd):
    tiny.data.resident_bytes = 0
    if kept:
        tiny.data[kept] = 20 * 6 * 6
    source = open_source(tiny)
    assert isinstance(source, RecordSource) == (not kept)
    images, labels = everything(source), source.labels(np.arange(20))
    assert images.shape == (20, 6, 6, 1) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert sorted(labels) == list(range(20))
    np.testing.assert_array_equal(
        images, np.broadcast_to(10 * labels[:, None, None, None], images.shape)
    )
    positions = np.array([7, 3, 3])
    np.testing.assert_array_equal(source.images(positions), images[positions])
    np.testing.assert_array_equal(source.labels(positions), labels[positions])
    assert not caplog.messages and capfd.readouterr() == ("", "")


def test_tfds_splits(tiny):
    labels = open_source(tiny).labels(np.arange(20))
    np.testing.assert_array_equal(
        open_source(tiny, "train[25%:50%]").labels(np.arange(5)), labels[5:10]
    )
    assert len(open_source(tiny, "test")) == 5
    assert len(open_source(tiny, "train+test")) == 25
    first, last = (open_source(tiny, split) for split in ("train[:5]", "train[-5:]"))
    np.testing.assert_array_equal(first.labels(np.arange(5)), labels[:5])
    np.testing.assert_array_equal(last.labels(np.arange(5)), labels[-5:])
    for split in ("validation", "train[:0]", "train[what"):
        message = refusal(tiny, split)
        assert f"config.data.split={split}" in message and "train, test" in message


def test_tfds_set_is_decoded_once(tiny, monkeypatch):
    before = everything(open_source(tiny))
    monkeypatch.setattr(records.RecordSource, "table", lambda *_: pytest.fail("decoded again"))
    np.testing.assert_array_equal(everything(open_source(tiny)), before)


def test_tfds_images_of_many_sizes(tiny):
    tiny.data.update(name="varied", channels=3)
    source = open_source(tiny)
    assert sorted(everything(source)[:, 0, 0, 0]) == list(range(5))
    assert source.image_shape == (6, 6, 3) and source.labels(np.arange(5)) is None
    tiny.data.update(name="oblong", channels=1)
    assert open_source(tiny).image_shape == (6, 6, 1)


def test_tfds_names_a_broken_record(tiny):
    from array_record.python.array_record_module import ArrayRecordReader

    tiny.data.name = "broken"
    named = re.search(r"record (\d+) of (.+array_record\S+)", refusal(tiny))
    record, file = named.groups()
    assert b"no image at all" in ArrayRecordReader(file).read([int(record)])[0]
    for split in ("test+train[1:]", f"test+train[{record}:]"):
        assert named[0] in refusal(tiny, split)


def test_tfds_set_that_is_not_prepared(tiny, tmp_path, caplog):
    tiny.data.update(name="mnist", data_dir=str(tmp_path / "it's here"))
    message = refusal(tiny)
    assert "config.data.name=mnist: not prepared" in message
    _, _, command = message.partition("pip install tensorflow importlib_resources && python -c ")
    [code] = shlex.split(command)
    asked = {}
    fake = types.SimpleNamespace(
        builder=lambda name, **kwargs: (
            asked.update(kwargs, name=name)
            or types.SimpleNamespace(download_and_prepare=lambda: asked.update(done=True))
        )
    )
    exec(code.replace("import tensorflow_datasets as tfds; ", ""), {"tfds": fake})
    assert asked == {
        "name": "mnist",
        "data_dir": tiny.data.data_dir,
        "file_format": "array_record",
        "done": True,
    }
    assert not caplog.messages
    tiny.data.data_dir = ""
    assert 'tfds.builder("mnist", file_format=' in refusal(tiny)


def test_tfds_set_prepared_as_tfrecord(tiny, tfds_dir, tmp_path):
    shutil.copytree(tfds_dir / "tiny", tmp_path / "tiny")
    info = tmp_path / "tiny/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    tiny.data.data_dir = str(tmp_path)
    message = refusal(tiny)
    assert "as tfrecord" in message and "download_and_prepare()" in message
    assert f"--config.data.data_dir={tmp_path}_array_record" in message


def test_tfds_requests_that_do_not_fit(tiny, tfds_dir, tmp_path):
    tiny.data.name = "pair"
    assert "left, right" in refusal(tiny)
    tiny.data.name = "cifar1"
    message = refusal(tiny)
    assert all(word in message for word in ("cifar10", "digits", "folder", "lsun_lmdb"))
    tiny.data.name = "huggingface:cifar10"
    assert "no such set" in refusal(tiny)
    tiny.data.name = "lsun/church"
    assert "lsun/church_outdoor" in refusal(tiny)
    tiny.data.name = "lsun/church_outdoor"
    assert "--config.data.name=lsun_lmdb/church_outdoor" in refusal(tiny)
    shutil.copytree(tfds_dir / "tiny", tmp_path / "tiny")
    [file] = (tmp_path / "tiny/1.0.0").glob("tiny-train.array_record*")
    file.unlink()
    tiny.data.update(name="tiny", data_dir=str(tmp_path))
    assert str(file) in refusal(tiny)


def test_tfds_names_no_class_of_another_package(tiny, tfds_dir, tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/evil_features.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(tmp_path / "code")
    shutil.copytree(tfds_dir / "tiny", tmp_path / "tiny")
    tiny.data.data_dir = str(tmp_path)
    assert len(open_source(tiny)) == 20
    file = tmp_path / "tiny/1.0.0/features.json"
    whole = file.read_text(encoding="utf-8")
    named = '"pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel"'
    assert named in whole
    for key in ("pythonClassName", "python_class_name", "type"):
        file.write_text(whole.replace(named, f'"{key}": "evil_features.Label"'), encoding="utf-8")
        message = refusal(tiny)
        assert f"{file} asks to run evil_features.Label" in message
    for damage in (whole[:-9], "[" * 100_000, "\xff"):
        file.write_text(damage, encoding="latin-1")
        assert f"{file} is damaged" in refusal(tiny)


# Places of every kind.


def times(root):
    """Of all there: what is made or removed in a folder, even for a moment, changes its time."""
    return {path: path.stat().st_mtime_ns for path in (root, *root.rglob("*"))}


@pytest.mark.parametrize("umask", [0o077, 0])
@pytest.mark.parametrize("cache", ["cache of Åse", "a file/cache"])
def test_nothing_is_written_into_the_data(config, tfds_dir, tmp_path, umask, cache, caplog):
    lmdb = pytest.importorskip("lmdb")
    root = tmp_path / "read only of Žofie"
    shutil.copytree(tfds_dir / "tiny", root / "sets é/tiny")
    made = [np.full((6, 6), 20 * k, np.uint8) for k in range(4)]
    (root / "faces ñ").mkdir()
    for index, image in enumerate(made):
        Image.fromarray(image).save(root / f"faces ñ/{index} ö.png")
    (root / "lsun/cat_train_lmdb").mkdir(parents=True)
    with (
        lmdb.open(str(root / "lsun/cat_train_lmdb"), map_size=2**20) as environment,
        environment.begin(write=True) as transaction,
    ):
        for index, image in enumerate(made):
            transaction.put(b"%d" % index, encoded(image).getvalue())
    (root / "lsun/cat_train_lmdb/lock.mdb").unlink()
    (tmp_path / "a file").write_text("")
    config.data.update(image_size=6, channels=1, cache_dir=str(tmp_path / cache))
    before, old = times(root), os.umask(umask)
    for path in before:  # The superuser may still write, so the times are compared as well.
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        for name, place in (("folder", "faces ñ"), ("lsun_lmdb/cat", "lsun"), ("tiny", "sets é")):
            config.data.update(name=name, data_dir=str(root / place))
            images = everything(open_source(config))
            if name != "tiny":
                np.testing.assert_array_equal(images[..., 0], made)
        assert len(images) == 20
    finally:
        os.umask(old)
        for path in before:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert times(root) == before
    kept = [*(tmp_path / cache).iterdir()] if cache.startswith("cache") else []
    assert len(kept) == (4 if kept else 0)  # Of each set the images, of the LMDB also its keys.
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask for path in kept)
    assert sum("config.data.cache_dir" in m for m in caplog.messages) == (0 if kept else 4)


# CelebA-HQ, both ways.


@pytest.fixture
def faces(tmp_path):
    """A folder of three PNGs, of 256x256, RGBA, and 512x512, and what they should become."""
    rng = np.random.default_rng(6)
    (tmp_path / "faces").mkdir()
    opaque, glass, large = (rng.integers(0, 256, (256, 256, c), np.uint8) for c in (3, 4, 3))
    for name, image in zip("012", (opaque, glass, large.repeat(2, 0).repeat(2, 1)), strict=True):
        Image.fromarray(image).save(tmp_path / f"faces/{name}.png")
    alpha = glass[..., 3:] / 255
    on_white = alpha * glass[..., :3] + (1 - alpha) * 255
    return tmp_path / "faces", [opaque, on_white]


def celeba_hq(variants, config, data_dir):
    faces = load_file(f"{CONFIGS / 'celeba_hq.py'}:{variants}")
    faces.data.update(data_dir=str(data_dir), cache_dir=config.data.cache_dir)
    return open_source(faces)


def test_celeba_hq_from_a_folder(config, faces):
    folder, known = faces
    images = everything(celeba_hq("folder", config, folder))
    assert images.shape == (3, 256, 256, 3)
    np.testing.assert_array_equal(images[0], known[0])
    assert np.abs(images[1] - known[1]).max() <= 1


def test_celeba_hq_from_the_tar_that_tfds_wants(config, faces, tmp_path, monkeypatch):
    """The genuine builder, with the two functions of TensorFlow's that it calls replaced."""
    monkeypatch.setitem(sys.modules, "importlib_resources", importlib.resources)
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import extractor
    from tensorflow_datasets.datasets.celeb_a_hq import celeb_a_hq_dataset_builder

    gfile = types.SimpleNamespace(exists=os.path.exists, GFile=open)
    for module in (extractor, celeb_a_hq_dataset_builder):
        monkeypatch.setattr(
            module, "tf", types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile))
        )
    folder, known = faces
    (folder / "2.png").unlink()
    (tmp_path / "tfds/downloads/manual").mkdir(parents=True)
    with tarfile.open(tmp_path / "tfds/downloads/manual/data256x256.tar", "w") as tar:
        tar.add(folder, arcname=".")
    arguments = {"data_dir": tmp_path / "tfds", "file_format": "array_record"}
    tfds.builder("celeb_a_hq/256", **arguments).download_and_prepare()
    source = celeba_hq("", config, tmp_path / "tfds")
    images = everything(source)
    assert images.shape == (2, 256, 256, 3) and source.labels(np.arange(2)) is None
    found = [[np.abs(image - face).max() <= 1 for face in known] for image in images]
    assert np.sum(found, axis=0).tolist() == [1, 1]
