"""LSUN's files against LMDBs made here: preparation, order of the keys, and whatever is wrong."""

import io
import logging
import os
import pathlib
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image
from sources_for_tests import everything, refusal

from ddpm_jax.config import default_config, load_file
from ddpm_jax.data import ArraySource, Batches, ReadError, RecordSource, lsun, open_source

lmdb = pytest.importorskip("lmdb")

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def photo(rng, height, width):
    """Smooth colours and some noise: what JPEG keeps, and every resampling changes."""
    y, x = np.mgrid[:height, :width] / 16
    waves = np.stack([np.sin(x + f * y + p) for f, p in rng.uniform(0, 3, (3, 2))], -1)
    return np.uint8(127.5 + 90 * waves + rng.uniform(-30, 30, waves.shape))


def encoded(image, form="JPEG", **kwargs):
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **{"quality": 75, **kwargs})
    return file.getvalue()


def make(path, records):
    """An LMDB at `path` of `records`, written in their order, without its lock file."""
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as txn:
        for key, value in records.items():
            txn.put(key, value)
    (path / "lock.mdb").unlink()
    return path


def flat(count, size=8):
    """Records of one grey level each, whose keys are in another order than they are written."""
    keys = [f"{value * 37 % 251:02x}".rjust(40, "f").encode() for value in range(count)]
    return {key: encoded(np.full((size, size, 3), n, np.uint8)) for n, key in enumerate(keys)}


@pytest.fixture
def config(tmp_path):
    config = default_config()
    config.data.update(
        name="lsun_lmdb/church_outdoor",
        data_dir=str(tmp_path / "lsun"),
        cache_dir=str(tmp_path / "cache"),
        image_size=8,
        resident_bytes=0,
    )
    return config


@pytest.fixture
def church(config, tmp_path):
    """The config, the LMDB of 20 images, and their grey levels in the order of their keys."""
    records = flat(20)
    path = make(tmp_path / "lsun/church_outdoor_train_lmdb", records)
    levels = [level for _, level in sorted((key, n) for n, key in enumerate(records))]
    return config, path, levels


# Preparation.


def lanczos(image, size):
    """Lanczos resampling in float64, rounded after each axis as Pillow does: columns, then rows."""
    for axis in (1, 0):
        length = image.shape[axis]
        scale = length / size
        support = 3 * max(scale, 1)
        centres = (np.arange(size) + 0.5) * scale
        places = np.arange(length) + 0.5
        z = (places - centres[:, None]) / max(scale, 1)
        weights = np.sinc(z) * np.sinc(z / 3) * (np.abs(places - centres[:, None]) < support)
        weights /= weights.sum(axis=1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
        image = np.clip(np.floor(image + 0.5), 0, 255)
    return image


@pytest.mark.parametrize(
    ("height", "width"), [(64, 85), (86, 64), (64, 64), (100, 133), (131, 98), (64, 65), (40, 51)]
)
@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_images_are_prepared_as_by_stylegan2s_tool(config, tmp_path, height, width, form):
    value = encoded(photo(np.random.default_rng(height), height, width), form)
    make(tmp_path / "lsun/church_outdoor_train_lmdb", {b"key": value})
    config.data.image_size = 64
    [image] = everything(open_source(config))
    decoded = np.asarray(Image.open(io.BytesIO(value)))
    crop = min(height, width)
    square = decoded[
        (height - crop) // 2 : (height + crop) // 2, (width - crop) // 2 : (width + crop) // 2
    ]
    if crop == 64:
        np.testing.assert_array_equal(image, square)
        return
    difference = np.abs(image - lanczos(square.astype(np.float64), 64))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.001


def test_grey_and_turned_images(config, tmp_path):
    shades = photo(np.random.default_rng(0), 8, 10)
    exif = Image.Exif()
    exif[0x0112] = 3  # Turned by 180 degrees, which OpenCV minds too.
    records = {b"0": encoded(shades[..., 0]), b"1": encoded(shades, "WEBP", exif=exif)}
    make(tmp_path / "lsun/church_outdoor_train_lmdb", records)
    grey, turned = everything(open_source(config))
    assert (grey == grey[..., :1]).all()
    level = np.asarray(Image.open(io.BytesIO(records[b"0"])))
    np.testing.assert_array_equal(grey[..., 0], level[:, 1:9])
    whole = np.asarray(Image.open(io.BytesIO(records[b"1"])))
    np.testing.assert_array_equal(turned, whole[::-1, ::-1][:, 1:9])
    config.data.channels = 1
    assert open_source(config).image_shape == (8, 8, 1)


# Keys and records.


def test_images_come_in_the_order_of_their_keys(church):
    config, _, levels = church
    assert levels != sorted(levels)
    source = open_source(config)
    assert isinstance(source, RecordSource) and source.image_shape == (8, 8, 3)
    images = everything(source)
    assert images.dtype == np.uint8 and len(source) == 20
    np.testing.assert_array_equal(images[:, 0, 0, 0], levels)
    np.testing.assert_array_equal(source.images(np.array([7, 3, 3])), images[[7, 3, 3]])
    assert source.labels(np.arange(20)) is None


def test_keys_of_any_length_and_bytes(config, tmp_path):
    keys = [b"a", b"a\0", b"a\0\0", b"\0", b"\xff" * 511, b"b" * 40]
    records = {key: encoded(np.full((8, 8, 3), 9 * n, np.uint8)) for n, key in enumerate(keys)}
    make(tmp_path / "lsun/church_outdoor_train_lmdb", records)
    order = [9 * keys.index(key) for key in sorted(keys)]
    for _ in range(2):  # Listed, and from the cache.
        np.testing.assert_array_equal(everything(open_source(config))[:, 0, 0, 0], order)


def test_a_set_that_fits_is_decoded_once(church, monkeypatch):
    config, _, levels = church
    config.data.resident_bytes = 20 * 8 * 8 * 3
    for _ in range(2):
        source = open_source(config)
        assert isinstance(source, ArraySource)
        np.testing.assert_array_equal(everything(source)[:, 0, 0, 0], levels)
        monkeypatch.setattr(RecordSource, "table", lambda *_: pytest.fail("decoded again"))


def test_many_threads_and_sources_read_at_once(church):
    config, _, levels = church
    sources = [open_source(config) for _ in range(3)]
    wrong = []

    def work(seed):
        positions = np.random.default_rng(seed).integers(0, 20, 50)
        got = sources[seed % 3].images(positions)[:, 0, 0, 0]
        if not (got == np.array(levels)[positions]).all():
            wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_sources_opened_at_once_by_many_threads(church):
    config, _, levels = church
    found = []
    threads = [threading.Thread(target=lambda: found.append(open_source(config))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all((everything(source)[:, 0, 0, 0] == levels).all() for source in found)


def test_batches(church):
    config, _, levels = church
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    with Batches(open_source(config), 0, 10, 2, sharding, resident=False) as batches:
        seen = np.asarray(batches(0))[..., 0, 0, 0].ravel()
    assert sorted(seen) == sorted(levels)  # Two batches of ten are an epoch.


def test_the_file_is_left_as_it_is(church):
    config, path, _ = church
    before = os.stat(path / "data.mdb"), (path / "data.mdb").read_bytes()
    everything(open_source(config))
    assert os.listdir(path) == ["data.mdb"]
    after = os.stat(path / "data.mdb"), (path / "data.mdb").read_bytes()
    assert before[0].st_mtime_ns == after[0].st_mtime_ns and before[1] == after[1]


# The list of keys.


@pytest.fixture
def listings(monkeypatch):
    """The paths that are listed while the test runs."""
    listed, original = [], lsun._list_keys
    monkeypatch.setattr(lsun, "_list_keys", lambda path: listed.append(path) or original(path))
    return listed


def test_keys_are_listed_once(church, listings, tmp_path):
    config, path, levels = church
    for _ in range(2):
        assert (everything(open_source(config))[:, 0, 0, 0] == levels).all()
    assert listings == [path]
    [file] = (tmp_path / "cache").iterdir()
    np.load(file, allow_pickle=False)
    whole, table = file.read_bytes(), np.load(file)
    lengths = table.copy()
    lengths["length"] = 41
    for damage in (b"", whole[:-7], whole[:100], b"PK" + whole[2:], np.arange(3), lengths):
        file.unlink()
        if isinstance(damage, bytes):
            file.write_bytes(damage)
        else:
            np.save(file, damage)
        assert (everything(open_source(config))[:, 0, 0, 0] == levels).all()
        assert file.read_bytes() == whole and len(list((tmp_path / "cache").iterdir())) == 1
    assert len(listings) == 7


def test_another_file_in_the_same_place_is_listed_anew(church, listings):
    config, path, _ = church
    first = open_source(config)
    keys = {first.key}
    config.data.image_size = 4
    keys.add(open_source(config).key)
    config.data.update(image_size=8, channels=1)
    keys.add(open_source(config).key)
    assert everything(first).shape == (20, 8, 8, 3)  # As it was opened.
    config.data.channels = 3
    assert open_source(config).key == first.key and len(listings) == 1
    del first
    stat = os.stat(path / "data.mdb")
    (path / "data.mdb").unlink()
    path.rmdir()
    make(path, flat(40))
    os.utime(path / "data.mdb", ns=(stat.st_mtime_ns, stat.st_mtime_ns))  # Of the same age.
    second = open_source(config)
    assert len(second) == 40 and len(listings) == 2
    keys.add(second.key)
    del second
    content = (path / "data.mdb").read_bytes()
    (path / "data.mdb").unlink()
    (path / "data.mdb").write_bytes(content.replace(b"ffff", b"eeee"))  # Of the same size.
    os.utime(path / "data.mdb", ns=(10**18, 10**18))
    third = open_source(config)
    assert sorted(everything(third)[:, 0, 0, 0]) == list(range(40)) and len(listings) == 3
    keys.add(third.key)
    assert len(keys) == 5


def test_without_a_cache(church, listings, tmp_path, caplog):
    config, _, levels = church
    (tmp_path / "file").write_text("")
    config.data.cache_dir = str(tmp_path / "file" / "cache")
    source = open_source(config)
    assert (everything(source)[:, 0, 0, 0] == levels).all()
    [message] = caplog.messages
    assert "config.data.cache_dir" in message and "\n" not in message
    again = open_source(config)  # While the first is open, its list serves.
    assert (everything(again)[:, 0, 0, 0] == levels).all() and len(listings) == 1


def test_a_stopped_listing_leaves_nothing(church, tmp_path, monkeypatch):
    config, _, levels = church

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_source(config)
    assert list((tmp_path / "cache").iterdir()) == []
    assert (everything(open_source(config))[:, 0, 0, 0] == levels).all()


def test_empty_records_are_left_out(config, tmp_path, caplog):
    records = flat(6)
    del records[min(records)]
    path = make(tmp_path / "lsun/church_outdoor_train_lmdb", {b"0": b"", b"zz": b"", **records})
    source = open_source(config)
    assert len(source) == 5
    assert sorted(everything(source)[:, 0, 0, 0]) == [1, 2, 3, 4, 5]
    assert caplog.messages == [f"{path}: 2 of 7 records are empty and left out"]
    assert caplog.records[0].levelno == logging.WARNING


# Which LMDB.


def test_categories_and_splits(config, tmp_path):
    root = tmp_path / "lsun"
    for count, name in enumerate(
        ["church_outdoor_train_lmdb", "church_outdoor_val_lmdb", "cat", "bedroom_train_lmdb"], 2
    ):
        make(root / name, flat(count))
    (root / "notes").mkdir()
    (root / "cat.zip").write_bytes(b"")
    assert len(open_source(config)) == 2
    assert len(open_source(config, "val")) == len(open_source(config, "validation")) == 3
    message = refusal(config, "test")
    assert "config.data.split=test" in message and "train, val" in message
    config.data.name = "lsun_lmdb/cat"
    assert len(open_source(config)) == 4
    assert "of cat" in refusal(config, "val")
    config.data.name = "lsun_lmdb"
    message = refusal(config)
    assert "lsun_lmdb/CATEGORY" in message and "bedroom, cat, church_outdoor" in message
    config.data.name = "lsun_lmdb/tower"
    assert "bedroom, cat, church_outdoor" in refusal(config)
    config.data.data_dir = str(root / "bedroom_train_lmdb")
    assert "holds bedroom;" in refusal(config)
    for config.data.name in ("lsun_lmdb", "lsun_lmdb/bedroom"):
        assert len(open_source(config)) == 5
        message = refusal(config, "val")
        assert "config.data.split=val" in message and "holds train" in message


def test_two_folders_of_the_same_images_are_refused(config, tmp_path):
    for name in ("car", "car_lmdb"):
        make(tmp_path / "lsun" / name, flat(2))
    config.data.name = "lsun_lmdb"
    message = refusal(config)
    assert str(tmp_path / "lsun/car,") in message and str(tmp_path / "lsun/car_lmdb") in message


@pytest.mark.parametrize("variant", ["church", "cat", "bedroom", "bedroom_large"])
def test_the_config_file_opens_lsuns_folders(variant, config, tmp_path):
    given = config.data
    folders = {"church": "church_outdoor_train_lmdb", "cat": "cat"}
    folder = folders.get(variant, "bedroom_train_lmdb")
    make(tmp_path / "lsun" / folder, flat(2, size=256))
    config = load_file(f"{CONFIGS / 'lsun.py'}:{variant}")
    config.data.update(data_dir=given.data_dir, cache_dir=given.cache_dir)
    assert everything(open_source(config)).shape == (2, 256, 256, 3)


# Whatever is wrong.


def test_requests_that_do_not_fit(config, tmp_path):
    for config.data.data_dir in ("", str(tmp_path / "nowhere"), __file__):
        message = refusal(config)
        assert f"config.data.data_dir={config.data.data_dir}:" in message
        assert "data.mdb" in message and "--config.data.data_dir=PATH" in message
    (tmp_path / "lsun").mkdir()
    config.data.data_dir = str(tmp_path / "lsun")
    assert "--config.data.data_dir=PATH" in refusal(config)
    (tmp_path / "lsun/church_outdoor_train_lmdb.zip").write_bytes(b"")
    assert "unzip church_outdoor_train_lmdb.zip" in refusal(config)
    config.data.channels = 2
    message = refusal(config)
    assert "--config.data.channels=1" in message and "config.data.channels=2" in message


def test_files_that_are_no_whole_lmdb(church, tmp_path):
    config, path, _ = church
    whole = (path / "data.mdb").read_bytes()
    damages = {
        "empty": b"",
        "text": b"<html>404</html>" * 1000,
        "noise": np.random.default_rng(0).bytes(20_000),
        "meta": whole[:8192],
        "torn": whole[: len(whole) // 2],
        "page": whole[:-4096],
        "byte": whole[:-1],
    }
    for name, content in damages.items():
        folder = tmp_path / name / "church_outdoor_train_lmdb"
        folder.mkdir(parents=True)
        (folder / "data.mdb").write_bytes(content)
        config.data.data_dir = str(tmp_path / name)
        message = refusal(config)
        assert str(folder / "data.mdb") in message and "again" in message, name
    assert not (tmp_path / "cache").exists()


def test_a_file_torn_after_its_keys_were_listed(church):
    config, path, _ = church
    open_source(config)
    stat = os.stat(path / "data.mdb")
    os.truncate(path / "data.mdb", stat.st_size - 4096)
    os.utime(path / "data.mdb", ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert "no whole LMDB" in refusal(config)


def test_a_lmdb_without_images(config, tmp_path):
    path = make(tmp_path / "lsun/church_outdoor_train_lmdb", {})
    assert f"{path} holds no images" in refusal(config)
    path = make(tmp_path / "other/church_outdoor_train_lmdb", {b"a": b""})
    config.data.data_dir = str(tmp_path / "other")
    assert f"{path} holds no images" in refusal(config)


def test_a_corrupt_record_is_named(config, tmp_path):
    torn = encoded(photo(np.random.default_rng(1), 64, 64))[:900]
    records = {b"a" * 40: encoded(np.zeros((8, 8, 3), np.uint8)), b"c" * 40: torn, b"d": b"none"}
    path = make(tmp_path / "lsun/church_outdoor_train_lmdb", records)
    source = open_source(config)
    assert source.images(np.array([0])).shape == (1, 8, 8, 3)
    for position, key in ((1, "c" * 40), (2, "d")):
        with pytest.raises(ReadError) as caught:
            source.images(np.array([0, position]))
        assert f"record {key} of {path} cannot be read" in str(caught.value)
        assert "\n" not in str(caught.value)
    config.data.resident_bytes = 2**20
    assert f"record {'c' * 40} of {path}" in refusal(config)


def test_without_the_package(church, monkeypatch):
    config, _, _ = church
    monkeypatch.setitem(sys.modules, "lmdb", None)
    message = refusal(config)
    assert "pip install -e '.[lmdb]'" in message


def test_the_package_is_imported_only_when_needed():
    code = "import ddpm_jax.data, sys; sys.exit('lmdb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
