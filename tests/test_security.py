"""Files of others: nothing in them is run, and they cost no more than they are.

Where a test says so, the process may take only little more memory while it reads: a file that made
it take what it claims would fail in another way.
"""

import ast
import contextlib
import io
import os
import pathlib
import resource
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from PIL import Image

from ddpm_jax import bounded, generation, interop, parts
from ddpm_jax.config import RequestError, default_config
from ddpm_jax.data import open_source
from ddpm_jax.evaluation import manifest, weights

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted(p for name in ("ddpm_jax", "experiments") for p in (ROOT / name).rglob("*.py"))


@contextlib.contextmanager
def little_memory(extra=2**28):
    """Lets the process take only so many bytes more, touched or not; on Linux, that is."""
    if not sys.platform.startswith("linux"):
        yield
        return
    pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no such limit there")
def test_the_limit_of_memory_is_one():
    with little_memory(), pytest.raises(MemoryError):
        np.empty(2**30, np.uint8)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# What the code calls.


def calls():
    """(module, name of the function as it is written, keywords) of every call."""
    for path in SOURCES:
        module = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield module, ast.unparse(node.func), {k.arg: k.value for k in node.keywords}, node


RISKY = {
    *("np.load", "np.fromfile", "pickle.load", "pickle.loads", "torch.load", "yaml.load"),
    *("eval", "exec", "compile", "__import__", "importlib.import_module", "os.system"),
    *("importlib.util.spec_from_file_location", "Image.open"),
}
RUNNERS = {"pickle", "marshal", "shelve", "yaml", "torch", "dill", "joblib", "cloudpickle", "runpy"}


def test_nothing_runs_what_it_reads():
    assert {(module, name) for module, name, _, _ in calls() if name in RISKY} <= {
        ("ddpm_jax/bounded.py", "Image.open"),
        ("ddpm_jax/config.py", "importlib.util.spec_from_file_location"),  # The user's config.
        ("ddpm_jax/data/sources.py", "np.load"),  # The digits, which are the package's own.
        ("experiments/paper.py", "importlib.import_module"),  # Modules of experiments/.
        ("experiments/reporting/html.py", "Image.open"),  # Of what read_png has checked.
        ("experiments/speeding/torch_peers.py", "np.load"),  # Which the contest has just written.
        ("experiments/sweeping/cells.py", "importlib.util.spec_from_file_location"),
    }
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and RUNNERS & {getattr(node, "module", None), *(alias.name for alias in node.names)}
    }
    assert importers == {
        "ddpm_jax/evaluation/readers.py",  # Its Unpickler calls nothing.
        "experiments/speeding/torch_peers.py",  # Which runs PyTorch, and loads nothing with it.
    }


def test_text_names_its_encoding():
    """Of the built-in open and of subprocesses; epath is always UTF-8."""
    for module, name, keywords, node in calls():
        where = f"{module}:{node.lineno}"
        if name == "open":
            mode = node.args[1] if len(node.args) > 1 else keywords.get("mode")
            assert "encoding" in keywords or "b" in ast.unparse(mode), where
        if name.startswith("subprocess."):
            assert not {"text", "universal_newlines"} & keywords.keys(), where


LOCALE = """
import locale, os, pathlib, sys, warnings
import numpy as np
from PIL import Image
from ddpm_jax import interop, models
from ddpm_jax.config import default_config
from ddpm_jax.data import open_source
from ddpm_jax.evaluation import manifest

warnings.filterwarnings("error", category=EncodingWarning, module="ddpm_jax|experiments")
assert sys.flags.utf8_mode == 0 and locale.getencoding().lower() not in ("utf-8", "utf8")
root = pathlib.Path(sys.argv[1])
root.mkdir()
Image.new("RGB", (4, 4), (1, 2, 3)).save(root / os.fsdecode("ö.png".encode()))
config = default_config()
config.data.update(name="folder", data_dir=str(root), cache_dir=str(root / "cache"), image_size=4)
assert (open_source(config).images(np.array([0])) == (1, 2, 3)).all()
m = manifest.Measured(1.0, unit="bits ± é", protocol={"σ": "Å"})
manifest.save(root / "m.json", manifest.Manifest("m", m, {"checkpoint": 1}, {"time": ""}))
assert manifest.load(root / "m.json").measured.protocol == {"σ": "Å"}
interop.save_diffusers(root / "net", models.UNet(channels=32), {}, (4, 4, 3))
manifest.code_commit()
"""


def test_a_locale_without_utf_8(tmp_path):
    (tmp_path / "code.py").write_text(LOCALE, encoding="utf-8")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", tmp_path / "code.py", tmp_path / "of Åse"],
        env=os.environ | plain | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode(errors="replace")
    assert (tmp_path / "of Åse/ö.png").exists()


# Texts.


def test_texts_are_bounded(tmp_path):
    path = tmp_path / "m.json"
    with open(path, "wb") as file:
        file.truncate(2**40)  # Sparse.
    with little_memory(), pytest.raises(ValueError, match="1,099,511,627,776 bytes, more than"):
        bounded.read_text(path)
    with little_memory(), pytest.raises(ValueError, match=r"m.json is not a result's manifest"):
        manifest.load(path)
    with little_memory(), pytest.raises(ValueError, match="1,099,511,627,776 bytes, more than"):
        bounded.read_arrays(path)
    assert bounded.read_bytes("/dev/zero") == b""
    path.write_bytes(b"x" * 11)
    assert bounded.read_bytes(path, 11) == b"x" * 11
    with pytest.raises(ValueError, match="11 bytes, more than 10"):
        bounded.read_bytes(path, 10)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**6, "", "{", "\xff", "1" * 10**5])
def test_json_that_is_none(tmp_path, text):
    path = tmp_path / "m.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError):
        bounded.read_json(path)
    with pytest.raises(ValueError, match=r"m.json is not a result's manifest"):
        manifest.load(path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    (tmp_path / interop.WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(ValueError):
        interop.load_diffusers(tmp_path)
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces/protocol.json").write_text(text, encoding="latin-1")
    with pytest.raises(RequestError, match="was begun with a=None"):
        parts.collect(
            1, 1, None, "image", print, epath.Path(tmp_path / "pieces"), {"a": 1}, lambda: True
        )


# Arrays.

ARRAYS = {
    "images": np.arange(60, dtype=np.uint8).reshape(3, 5, 4),
    "floats": np.linspace(0, 1, 7, dtype=np.float32),
    "protocol": np.array('{"a": "σ"}'),
    "none": np.zeros((0, 3)),
}


@pytest.mark.parametrize("text", ["[1]", "3", "null"])
def test_a_protocol_of_pieces_that_is_no_object(tmp_path, text):
    (tmp_path / "protocol.json").write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match="was begun with a=None"):
        parts.collect(1, 1, None, "image", print, epath.Path(tmp_path), {"a": 1}, lambda: True)


def npz(path, save=np.savez, **arrays):
    save(path, **arrays)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_honest_files(tmp_path, save):
    path = npz(tmp_path / "a.npz", save, **ARRAYS, turned=np.asfortranarray(ARRAYS["images"][0]))
    found = bounded.read_arrays(path)
    assert [*found] == [*ARRAYS, "turned"]
    for name, array in (ARRAYS | {"turned": ARRAYS["images"][0]}).items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert [*bounded.read_arrays(path, ("floats",))] == ["floats"]
    with pytest.raises(ValueError, match="no array 'x'"):
        bounded.read_arrays(path, ("x",))
    npz(tmp_path / "zeros.npz", save, zeros=np.zeros(10**6))  # Honest, and 1000 times as small.
    assert not bounded.read_arrays(tmp_path / "zeros.npz")["zeros"].any()


def member(path, content, claimed=None, method=zipfile.ZIP_STORED, copies=1):
    """A .npz with such a member x.npy, which claims another size in the list of members."""
    with zipfile.ZipFile(path, "w", method, allowZip64=True) as archive:
        archive.writestr("x.npy", content)
        if claimed is not None:
            archive.filelist[0].file_size = claimed
        archive.filelist *= copies
        archive._didModify = True
    return path


def header(shape, descr="|u1", length=None):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) if length is None else length) + text


BOMBS = {
    "a huge shape": lambda p: member(p, header((2**40,)) + b"abc"),
    "a shape that overflows": lambda p: member(p, header((2**62, 4)) + b"abc"),
    "a negative shape": lambda p: member(p, header((-1, 3)) + b"abc"),
    "a shape of negatives": lambda p: member(p, header((-1, -3)) + b"abc"),
    "a huge dtype": lambda p: member(p, header((), f"|V{2**31 - 1}") + b"abc"),
    "a huge size": lambda p: member(p, header((2**40,)) + b"abc", 2**40 + len(header((2**40,)))),
    "a huge size, compressed": lambda p: member(
        p, header((2**40,)), 2**40 + len(header((2**40,))), zipfile.ZIP_DEFLATED
    ),
    "many names of a member": lambda p: member(
        p, header((2**20,)) + bytes(2**20), None, zipfile.ZIP_DEFLATED, 1000
    ),
    "a cut header": lambda p: member(p, header((3,), length=60_000)),
    "a header of parentheses": lambda p: member(p, header((3,)).replace(b"(3,)", b"(" * 4)),
    "another format": lambda p: member(p, b"\x93NUMPY\x09\x00" + header((3,))[8:] + b"abc"),
    "another method": lambda p: member(p, header((3,)) + b"abc", None, zipfile.ZIP_LZMA),
    "no archive": lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)),
    "an array": lambda p: p.write_bytes(header((2**40,)) + b"abc"),
    "nothing": lambda p: p.write_bytes(b""),
}


@pytest.mark.parametrize("what", BOMBS)
def test_arrays_that_are_not_there(tmp_path, what, caplog):
    path = tmp_path / "a.npz"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, of the two names that are one.
        BOMBS[what](path)
    assert path.stat().st_size < 2**20
    with little_memory(), pytest.raises(ValueError):
        bounded.read_arrays(path)
    with little_memory():
        assert parts.read(epath.Path(path)) is None
        with pytest.raises(RequestError, match=r"a.npz cannot be read"):
            generation.load_images(path)
    assert caplog.messages[0].startswith(f"{path} cannot be read: ")


def test_a_pickle_among_arrays_is_not_run(tmp_path):
    made = tmp_path / "made"
    objects = np.array([Payload(made)], object)
    path = npz(tmp_path / "a.npz", images=objects, protocol=objects)
    with pytest.raises(ValueError, match="is of objects"):
        bounded.read_arrays(path)
    with pytest.raises(RequestError):
        generation.load_images(path)
    np.save(tmp_path / "b.npz", objects)
    (tmp_path / "b.npz.npy").rename(tmp_path / "b.npz")
    with pytest.raises(ValueError):
        bounded.read_arrays(tmp_path / "b.npz")
    (tmp_path / "c.npy").write_bytes(header((1,), "|O") + bytes(8))  # As many as it claims.
    with pytest.raises(ValueError, match="is of objects"):
        bounded.map_array(tmp_path / "c.npy")
    assert not made.exists()
    with contextlib.suppress(Exception):
        np.load(path, allow_pickle=True)["images"]
    assert made.exists()  # The payload is one.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_arrays_are_never_read_wrongly(tmp_path, save):
    whole = npz(tmp_path / "a.npz", save, **ARRAYS).read_bytes()
    rng, path, right = np.random.default_rng(0), tmp_path / "b.npz", 0
    damages = [whole[:n] for n in range(0, len(whole), 37)]
    for place, bit in zip(rng.integers(0, len(whole), 400), rng.integers(0, 8, 400), strict=True):
        damages.append(bytearray(whole))
        damages[-1][place] ^= 1 << bit
    for damage in damages:
        path.write_bytes(damage)
        with contextlib.suppress(ValueError, OSError), little_memory():
            found = bounded.read_arrays(path, tuple(ARRAYS))
            for name, array in ARRAYS.items():
                np.testing.assert_array_equal(found[name], array)
            right += 1
    assert right < len(damages) / 2  # Of the others a date was hit, or a part that is not used.


def test_samples_with_a_protocol_that_is_none(tmp_path):
    for text in ("{", "[1]", "3", "[" * 10**5):
        path = npz(tmp_path / "a.npz", images=ARRAYS["images"], protocol=np.array(text))
        with pytest.raises(RequestError, match=r"a.npz is damaged"):
            generation.load_images(path)


# Weights.


def tensors(head, content=b"", length=None):
    return struct.pack("<Q", len(head) if length is None else length) + head + content


ENTRY = '{"x": {"dtype": "%s", "shape": [%d], "data_offsets": [0, %d]}}'
TENSORS = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "an absurd header": tensors(b"{}", length=2**60),
    "a header beyond the file": tensors(b"{}", length=3),
    "a negative header": tensors(b"{}", length=2**64 - 1),
    "no JSON": tensors(b"[[["),
    "deep JSON": tensors(b"[" * 10**5),
    "a list": tensors(b"[]"),
    "an absurd shape": tensors((ENTRY % ("F32", 2**40, 2**42)).encode(), bytes(16)),
    "a shape of other bytes": tensors((ENTRY % ("F32", 2**40, 16)).encode(), bytes(16)),
    "a shape that overflows": tensors((ENTRY % ("F32", 2**62, 0)).encode()),
    "an unknown dtype": tensors((ENTRY % ("O", 2, 16)).encode(), bytes(16)),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_none(tmp_path, what):
    path = tmp_path / interop.WEIGHTS_FILE
    path.write_bytes(TENSORS[what])
    with little_memory(), pytest.raises(ValueError):
        bounded.read_tensors(path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with little_memory(), pytest.raises(ValueError):
        interop.load_diffusers(tmp_path)
    kept = tmp_path / "inception-2015-12-05-0.safetensors"
    path.rename(kept)
    with little_memory(), pytest.raises(RequestError, match="no weights of the Inception network"):
        weights.load_inception("", str(tmp_path))  # Passed over.


def test_tensors_of_an_honest_file(tmp_path):
    state = {"σ": np.arange(6, dtype=np.float32).reshape(2, 3)}
    safetensors.numpy.save_file(state, tmp_path / "a", {"of": "Åse"})
    found, metadata = bounded.read_tensors(tmp_path / "a")
    np.testing.assert_array_equal(found["σ"], state["σ"])
    assert metadata == {"of": "Åse"}
    size = (tmp_path / "a").stat().st_size
    with pytest.raises(ValueError, match=f"{size:,} bytes, more than {size - 1:,}"):
        bounded.read_tensors(tmp_path / "a", size - 1)


def test_a_huge_file_is_not_taken_for_weights(tmp_path):
    with open(tmp_path / "w.pth", "wb") as file:
        file.truncate(2**40)
    with little_memory(), pytest.raises(RequestError, match=r"w.pth is another file: it has 1,099"):
        weights.load_inception(str(tmp_path / "w.pth"), str(tmp_path / "cache"))


# Images.


def png(width, height):
    """A PNG that says so, of a few bytes."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    config = default_config()
    config.data.update(name="folder", data_dir=str(tmp_path / "images"), image_size=4)
    config.data.update(cache_dir=str(tmp_path / "cache"), read_attempts=1)
    return config, tmp_path / "images"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pillows", [None, 10**12, 2**26])
def test_images_of_too_many_pixels(folder, monkeypatch, pillows):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
    config, root = folder
    for width, height in ((2**14, 2**13 + 1), (2**17, 2**16), (2**27 + 1, 1)):
        (root / "0.png").write_bytes(png(width, height))
        with little_memory(), pytest.raises(RequestError) as caught:
            open_source(config)
        assert "0.png cannot be read" in str(caught.value)
        assert "too many pixels to be decoded, at most 134,217,728" in str(caught.value)
    with bounded.open_image(io.BytesIO(png(2**14, 2**13))) as image:  # The most that there may be.
        assert image.size == (2**14, 2**13)


def test_images_of_too_many_pixels_in_a_lmdb(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "cat").mkdir()
    with lmdb.open(str(tmp_path / "cat"), map_size=2**20) as made, made.begin(write=True) as txn:
        txn.put(b"one", png(2**17, 2**16))
    config = default_config()
    config.data.update(name="lsun_lmdb", data_dir=str(tmp_path), cache_dir=str(tmp_path / "c"))
    with little_memory(), pytest.raises(RequestError, match=r"record one of .* too many pixels"):
        open_source(config)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_program_is_run_for_an_image(folder, monkeypatch):
    """Pillow would have Ghostscript draw it."""
    config, root = folder
    (root / "0.png").write_bytes(EPS)
    assert Image.open(root / "0.png").format == "EPS"
    for name in ("Popen", "check_call", "call", "run"):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: pytest.fail("a program is run"))
    with pytest.raises(RequestError, match=r"0.png cannot be read .UnidentifiedImageError"):
        open_source(config)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_images_of_the_known_formats(folder, form):
    config, root = folder
    image = Image.fromarray(np.full((4, 4), 200, np.uint8))
    image.save(root / "0.png", form)
    assert np.abs(open_source(config).images(np.array([0])).astype(int) - 200).max() <= 2


def test_damaged_images_are_named(folder):
    config, root = folder
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(whole, "PNG")
    for length in range(0, len(whole.getvalue()) - 12, 97):
        (root / "0.png").write_bytes(whole.getvalue()[:length])
        with pytest.raises(RequestError, match=r"0.png cannot be read"):
            open_source(config)


# The cache of decoded images.


def test_a_cache_of_objects_or_of_absurd_sizes_is_made_again(folder, tmp_path):
    config, root = folder
    Image.new("RGB", (4, 4), (1, 2, 3)).save(root / "0.png")
    open_source(config)
    [kept] = (tmp_path / "cache").iterdir()
    np.save(tmp_path / "o.npy", np.array([Payload(tmp_path / "made")], object))
    for damage in (
        (tmp_path / "o.npy").read_bytes(),
        header((2**40,)),
        header((2**62, 4)),
        header((-1,)),
        header((3,)).replace(b"(3,)", b"(" * 4),
        header((3,)).replace(b"(3,)", b"'''#"),
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{",
    ):
        kept.unlink()
        kept.write_bytes(damage)
        with little_memory():
            assert (open_source(config).images(np.array([0])) == (1, 2, 3)).all()
    assert not (tmp_path / "made").exists()
