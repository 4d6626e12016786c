"""Sources against scikit-learn's digits, and against files and records made here."""

import collections
import hashlib
import io
import os
import pathlib
import re
import threading
import types

import numpy as np
import pytest
from PIL import Image
from sources_for_tests import everything, refusal

from ddpm_jax import bounded
from ddpm_jax.config import RequestError
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
