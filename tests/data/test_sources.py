"""Sources against scikit-learn's digits, and against files and records made here."""

import collections
import hashlib
import importlib.resources.abc
import io
import os
import pathlib
import re
import shlex
import shutil
import sys
import tarfile
import threading
import types

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import bounded
from ddpm_jax.config import RequestError, default_config, load_file
from ddpm_jax.data import (
    ArraySource,
    ReadError,
    RecordSource,
    fingerprint,
    folder,
    nbytes,
    open_source,
    records,
)

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.fixture
def config(tmp_path):
    config = default_config()
    config.data.cache_dir = str(tmp_path / "cache")
    return config


def everything(source):
    return source.images(np.arange(len(source)))


def refusal(config, *args, **kwargs):
    """The message of the RequestError that opening raises, which must be one line."""
    with pytest.raises(RequestError) as caught:
        open_source(config, *args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Digits.


@pytest.fixture
def digits(config):
    config.data.update(name="digits", image_size=8, channels=1)
    return config


def test_digits_are_scikit_learns(digits):
    known = pytest.importorskip("sklearn.datasets").load_digits()
    levels = np.array([round(255 * v / 16) for v in range(17)])
    for split, chosen in {
        "train": [i for i in range(1797) if i % 7 != 6],
        "test": [i for i in range(1797) if i % 7 == 6],
    }.items():
        source = open_source(digits, split)
        images = everything(source)
        assert images.dtype == np.uint8 and source.image_shape == (8, 8, 1)
        np.testing.assert_array_equal(images[..., 0], levels[known.images.astype(int)][chosen])
        np.testing.assert_array_equal(source.labels(np.arange(len(source))), known.target[chosen])
        assert nbytes(source) == images.nbytes
    assert (images.min(), images.max()) == (0, 255)


def test_requests_that_do_not_fit(digits):
    digits.train.batch_size = 2000
    assert "config.train.batch_size=2000" in refusal(digits, batch_size=2000)
    assert len(open_source(digits, batch_size=1541)) == 1541
    message = refusal(digits, "validation")
    assert "config.data.split=validation" in message and "train, test" in message
    digits.data.update(image_size=32, channels=3)
    message = refusal(digits)
    assert "8x8" in message
    assert "--config.data.image_size=8 --config.data.channels=1" in message


# Folders.


@pytest.fixture
def pictures(config, tmp_path):
    root = tmp_path / "pictures of Åse"
    root.mkdir()
    config.data.update(name="folder", data_dir=str(root), image_size=4, channels=3)
    return config, root


def picture(rng, height=4, width=4):
    return rng.integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_folder_in_order_of_relative_paths(pictures):
    config, root = pictures
    rng = np.random.default_rng(0)
    names = ["b/ø 2.png", "a.PNG", "b/a.png", "c.jpeg"]
    made = {name: picture(rng) for name in names}
    (root / "b").mkdir()
    for name, image in made.items():
        Image.fromarray(image).save(root / name)
    (root / "notes.txt").write_text("no image")
    (root / "._a.png").write_bytes(b"not one either")
    images = everything(open_source(config))
    order = ["a.PNG", "b/a.png", "b/ø 2.png"]
    np.testing.assert_array_equal(images[:3], [made[name] for name in order])
    np.testing.assert_array_equal(images[3], np.asarray(Image.open(root / "c.jpeg")))
    assert len(images) == 4
    assert open_source(config).labels(np.arange(4)) is None


@pytest.mark.parametrize("turned", [False, True])
def test_folder_crops_the_centre(pictures, turned):
    config, root = pictures
    wide = picture(np.random.default_rng(1), 4, 9)
    centre = wide[:, 2:6]
    if turned:
        wide, centre = wide.swapaxes(0, 1), centre.swapaxes(0, 1)
    Image.fromarray(wide).save(root / "wide.png")
    np.testing.assert_array_equal(everything(open_source(config))[0], centre)


def test_folder_resizes_without_aliasing(pictures):
    config, root = pictures
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    Image.fromarray(checks.astype(np.uint8)).save(root / "checks.png")
    image = everything(open_source(config))[0].astype(int)
    assert np.abs(image - 127.5).max() < 3  # Taking every sixteenth pixel would give 0 or 255.


def test_folder_colours(pictures):
    config, root = pictures
    red_glass = Image.new("RGBA", (4, 4), (255, 0, 0, 51))
    red_glass.save(root / "0.png")  # A fifth of red on four fifths of white.
    deep = np.full((4, 4), 0x8080, np.uint16)
    Image.fromarray(deep).save(root / "1.png")
    half = Image.fromarray(np.repeat(np.uint8([[200], [10]]), 2, 0).repeat(4, 1))
    exif = half.getexif()
    exif[0x0112] = 3  # Turned by 180 degrees.
    half.save(root / "2.png", exif=exif)
    palette = Image.new("P", (4, 4))
    palette.putpalette([10, 20, 30] * 256)
    palette.save(root / "3.png")
    images = everything(open_source(config))
    assert (images[0] == (255, 204, 204)).all()
    assert (images[1] == 0x80).all()
    assert (images[2, :2] == 10).all() and (images[2, 2:] == 200).all()
    assert (images[3] == (10, 20, 30)).all()
    config.data.channels = 1
    grey = everything(open_source(config))
    assert grey.shape == (4, 4, 4, 1)
    assert (grey[0] == round(0.299 * 255 + 0.701 * 204)).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
@pytest.mark.parametrize("clear", [None, 1000])
def test_deep_grey(tmp_path, mode, clear):
    deep = np.array([[0, 1000], [1001, 65535]])  # 1000 and 1001 are one grey of 8 bits.
    image = Image.fromarray(deep.astype({"I;16": "<u2", "I;16B": ">u2", "I": np.int32}[mode]))
    assert image.mode == mode
    if clear is not None:
        image.info["transparency"] = clear
    expected = [[0, 4 if clear is None else 255], [4, 255]]
    assert records.pixels(image, 2, 1)[..., 0].tolist() == expected
    assert (records.pixels(image, 2, 3)[..., 1] == expected).all()


def test_deep_grey_with_a_transparent_colour_from_a_file(pictures):
    config, root = pictures
    deep = np.full((4, 4), 1001, np.uint16)
    deep[0] = 1000
    Image.fromarray(deep).save(root / "0.png", transparency=1000)
    assert Image.open(root / "0.png").info["transparency"] == 1000
    image = everything(open_source(config))[0]
    assert (image[0] == 255).all() and (image[1:] == 4).all()


def test_integers_beyond_16_bits_are_clipped():
    image = Image.fromarray(np.array([[-5, 70_000], [-(2**31), 2**31 - 1]], np.int32))
    assert records.pixels(image, 2, 1)[..., 0].tolist() == [[0, 255], [0, 255]]


def test_folder_splits(pictures):
    config, root = pictures
    rng = np.random.default_rng(2)
    for name in ("x.png", "test/y.png"):
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(picture(rng)).save(root / name)
    assert len(open_source(config)) == 2
    assert len(open_source(config, "test")) == 1
    assert "test" in refusal(config, "validation")
    (root / "train").mkdir()
    assert "no images" in refusal(config)


def test_folder_requests_that_do_not_fit(pictures):
    config, root = pictures
    assert str(root) in refusal(config)
    config.data.channels = 2
    assert "--config.data.channels=1" in refusal(config)
    for directory in ("", str(root / "nowhere")):
        config.data.data_dir = directory
        assert "--config.data.data_dir=" in refusal(config)


def test_folder_names_a_corrupt_file(pictures, tmp_path):
    config, root = pictures
    rng = np.random.default_rng(3)
    Image.fromarray(picture(rng)).save(root / "good.png")
    whole = io.BytesIO()
    Image.fromarray(picture(rng, 64, 64)).save(whole, "PNG")
    (root / "torn.png").write_bytes(whole.getvalue()[:3000])
    assert str(root / "torn.png") in refusal(config)
    assert os.listdir(tmp_path / "cache") == []


def test_folder_cache(pictures, tmp_path, monkeypatch):
    config, root = pictures
    rng = np.random.default_rng(4)
    made = [picture(rng) for _ in range(3)]
    for index, image in enumerate(made):
        Image.fromarray(image).save(root / f"{index}.png")
    np.testing.assert_array_equal(everything(open_source(config)), made)
    [file] = (tmp_path / "cache").iterdir()

    with monkeypatch.context() as patch:  # It is not decoded again.
        patch.setattr(folder, "pixels", lambda *_: pytest.fail("decoded again"))
        np.testing.assert_array_equal(everything(open_source(config)), made)
    whole = np.load(file)
    for damage in (
        b"",
        file.read_bytes()[:-7],
        b"PK" + file.read_bytes()[2:],
        whole[:2],
        [1, 2, 3],
    ):
        file.unlink()
        if isinstance(damage, bytes):
            file.write_bytes(damage)
        else:
            np.save(file, damage)
        np.testing.assert_array_equal(everything(open_source(config)), made)

    config.data.image_size = 2
    assert open_source(config).image_shape == (2, 2, 3)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    config.data.image_size = 4
    made[1] = picture(rng)  # Another image of the same name; its size in bytes may be the same.
    Image.fromarray(made[1]).save(root / "1.png")
    os.utime(root / "1.png", ns=(10**18, 10**18))
    np.testing.assert_array_equal(everything(open_source(config)), made)


def test_folder_without_a_cache(pictures, tmp_path, caplog):
    config, root = pictures
    image = picture(np.random.default_rng(5))
    Image.fromarray(image).save(root / "only.png")
    (tmp_path / "file").write_text("")
    config.data.cache_dir = str(tmp_path / "file" / "cache")  # Not even root can make it.
    np.testing.assert_array_equal(everything(open_source(config)), [image])
    config.data.resident_bytes = 0
    source = open_source(config)
    assert isinstance(source, RecordSource)
    np.testing.assert_array_equal(everything(source), [image])
    assert len(caplog.messages) == 2 and "\n" not in "".join(caplog.messages)
    assert all("config.data.cache_dir" in message for message in caplog.messages)
    config.data.resident_bytes = 100
    (root / "torn.png").write_bytes(b"torn")
    assert str(root / "torn.png") in refusal(config)


def test_a_disk_that_is_too_small_is_left_alone(pictures, monkeypatch, caplog):
    config, root = pictures
    image = picture(np.random.default_rng(5))
    Image.fromarray(image).save(root / "only.png")
    monkeypatch.setattr(records.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10))
    np.testing.assert_array_equal(everything(open_source(config)), [image])
    (message,) = caplog.messages
    assert f"(10 bytes are free of the {image.size:,} that it takes)" in message
    assert not [*pathlib.Path(config.data.cache_dir).glob("*")]


# Files that cannot be read, or not at once.


@pytest.fixture
def flaky():
    """A source of five images whose middle one fails as often as `fails` says, and its pauses."""
    images, pauses = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1), []

    def make(fails, attempts):
        left = [fails]

        def read(position):
            if position == 2 and left[0]:
                left[0] -= 1
                raise OSError(5, "Input/output error\nof a disk")
            return (images[position],)

        where = "disk/{}.png".format
        kwargs = {"attempts": attempts, "pause": pauses.append}
        return RecordSource("made", "train", (2, 2, 1), 5, read, where, [], **kwargs)

    return make, images, pauses


@pytest.mark.parametrize(("fails", "attempts"), [(1, 3), (2, 3), (4, 5)])
def test_an_image_is_read_again(flaky, caplog, fails, attempts):
    make, images, pauses = flaky
    np.testing.assert_array_equal(everything(make(fails, attempts)), images)
    np.testing.assert_allclose(pauses, [0.1 * (k + 1) for k in range(fails)])
    assert caplog.messages == [
        "disk/2.png cannot be read (OSError: [Errno 5] Input/output error of a disk); "
        f"reading it again, attempt {k + 2} of {attempts}"
        for k in range(fails)
    ]


@pytest.mark.parametrize(("attempts", "said"), [(1, "once"), (3, "3 times")])
def test_an_image_that_stays_unreadable(flaky, tmp_path, caplog, attempts, said):
    make, _, pauses = flaky
    message = (
        f"disk/2.png cannot be read (OSError: [Errno 5] Input/output error of a disk), tried {said}"
    )
    with pytest.raises(ReadError) as caught:
        everything(make(100, attempts))
    assert str(caught.value) == message
    assert len(pauses) == len(caplog.messages) == attempts - 1
    for in_memory in (True, False):
        with pytest.raises(RequestError) as refused:
            records.decode_once(make(100, attempts), tmp_path / "cache", in_memory)
        assert str(refused.value) == f"config.data: {message}; replace or remove it"
    assert os.listdir(tmp_path / "cache") == []


def test_decoding_keeps_no_process_alive():
    def read(position):
        assert threading.current_thread().daemon
        return (np.zeros((2, 2, 1), np.uint8),)

    assert not threading.current_thread().daemon
    everything(RecordSource("made", "train", (2, 2, 1), 5, read, str, [], attempts=1))


def test_a_folder_on_a_bad_disk(pictures, monkeypatch):
    config, root = pictures
    made = [picture(np.random.default_rng(7)) for _ in range(3)]
    for index, image in enumerate(made):
        Image.fromarray(image).save(root / f"{index}.png")
    opened = collections.Counter()

    def open_image(path):
        opened[path.name] += 1
        if path.name == "1.png" and opened["1.png"] < 4:
            raise OSError(5, "Input/output error")
        return bounded.open_image(path)

    monkeypatch.setattr(folder, "open_image", open_image)
    monkeypatch.setattr(records, "PAUSE", 0.0)
    assert f"{root / '1.png'} cannot be read" in refusal(config)
    assert opened["1.png"] == 3  # The config's default.
    config.data.read_attempts = 1
    opened.clear()
    assert refusal(config).count("tried once") == 1
    config.data.read_attempts = 4
    opened.clear()
    np.testing.assert_array_equal(everything(open_source(config)), made)
    assert opened == {"0.png": 1, "1.png": 4, "2.png": 1}


# Fingerprints.


def fake(images):
    return ArraySource("fake", "train", images)


def test_a_fingerprint_is_of_what_is_read(digits, flaky):
    images = np.random.default_rng(8).integers(0, 256, (200, 3, 2, 1)).astype(np.uint8)
    kept = fingerprint(fake(images))
    assert re.fullmatch("[0-9a-f]{16}", kept)
    places = [int(199 * k / 63) for k in range(64)]
    content = b"(200, 3, 2, 1)" + b"".join(images[k].tobytes() for k in places)
    assert kept == hashlib.sha256(content).hexdigest()[:16]
    assert fingerprint(ArraySource("other", "test", images, np.arange(200))) == kept
    others = [images[:199], images[::-1], images[1:], images.reshape(200, 2, 3, 1), images[:1]]
    for place in (0, 199, places[31]):
        others.append(images.copy())
        others[-1][place, 2, 1, 0] ^= 1
    found = {fingerprint(fake(other)) for other in others}
    assert len(found) == len(others) and kept not in found
    make, images, _ = flaky
    assert fingerprint(make(1, 2)) == fingerprint(fake(images))
    assert fingerprint(open_source(digits)) != fingerprint(open_source(digits, "test"))


def test_a_fingerprint_is_cheap():
    asked = []

    class Counted(ArraySource):
        def images(self, positions):
            asked.extend(positions)
            return np.zeros((len(positions), 2, 2, 1), np.uint8)

        def __len__(self):
            return 3_000_000

    fingerprint(Counted("large", "train", np.zeros((1, 2, 2, 1), np.uint8)))
    assert len(set(asked)) == len(asked) == 64 and (min(asked), max(asked)) == (0, 2_999_999)


# TensorFlow Datasets.


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
    tiny.data.update({"resident_bytes": 0, "cache_bytes": 0})
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
