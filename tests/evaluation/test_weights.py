"""The users' weights: each accepted file as a whole, checksums, the converted file."""

import dataclasses
import hashlib
import io
import logging
import pickle
import re
import struct

import flax
import make_inception_golden as golden
import numpy as np
import pytest
from safetensors import numpy as safetensors
from tensorboardX.proto import graph_pb2
from test_readers import add_constant, assert_same

from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import inception, weights

# Whole files.


@pytest.fixture(scope="module")
def state():
    """Seeded weights of the whole network, by torch-fidelity's names."""
    with np.load(golden.FILE) as stored:
        names, shapes = stored["names"], stored["shapes"]
    return golden.seeded_state(
        {str(n): tuple(map(int, s.split(","))) for n, s in zip(names, shapes, strict=True)}
    )


@pytest.fixture(scope="module")
def params(state):
    return inception.from_torch_state(state)


def flat(loaded):
    return flax.traverse_util.flatten_dict(loaded.params, sep="/")


def table(index, data):
    """ACCEPTED with one entry's checksums replaced by those of this data."""
    entry = weights.ACCEPTED[index]
    if entry.sha256:
        checksum = {"sha256": hashlib.sha256(data).hexdigest()}
    else:
        checksum = {"md5": hashlib.md5(data).hexdigest()}
    entries = list(weights.ACCEPTED)
    entries[index] = dataclasses.replace(entry, **checksum, size=len(data))
    return tuple(entries)


def torch_file(state, params):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    tensors["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(0)
    file = io.BytesIO()
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def graph_file(state, params):
    graph = graph_pb2.GraphDef()
    for theirs, ours in inception.tf_names().items():
        add_constant(graph, f"{theirs}/conv2d_params", params[f"{ours}/kernel"])
        add_constant(graph, f"{theirs}/batchnorm/gamma", params[f"{ours}/scale"])
        add_constant(graph, f"{theirs}/batchnorm/beta", params[f"{ours}/bias"])
        add_constant(graph, f"{theirs}/batchnorm/moving_mean", params[f"{ours}/mean"])
        add_constant(graph, f"{theirs}/batchnorm/moving_variance", params[f"{ours}/var"])
        add_constant(graph, f"{theirs}/other", np.float32([1]))
    add_constant(graph, "softmax/weights", params["fc/kernel"])
    add_constant(graph, "softmax/biases", params["fc/bias"])
    return graph.SerializeToString()


def jax_fid_file(state, params):
    tree = {}
    for name, array in params.items():
        *module, leaf = name.split("/")
        part = () if module == ["fc"] else ("conv" if leaf == "kernel" else "bn",)
        tree[(*module, *part, leaf)] = array
    tree[("AuxLogits", "fc", "kernel")] = np.zeros((768, 1000), np.float32)
    return pickle.dumps(flax.traverse_util.unflatten_dict(tree))


@pytest.mark.parametrize(
    ("index", "make", "has_logits"),
    [(0, torch_file, True), (1, graph_file, True), (2, jax_fid_file, False)],
)
def test_each_accepted_file(tmp_path, state, params, index, make, has_logits):
    data = make(state, params)
    accepted = table(index, data)
    name = accepted[index].names[-1]
    (tmp_path / name).write_bytes(data)
    loaded = weights.load_inception(str(tmp_path), str(tmp_path / "cache"), accepted)
    assert loaded.has_logits == has_logits
    assert loaded.sha256 == hashlib.sha256(data).hexdigest()
    assert loaded.file_name == accepted[index].names[0]
    expected = {k: v for k, v in params.items() if has_logits or not k.startswith("fc/")}
    assert_same(flat(loaded), expected)


def test_the_published_checksums():
    by_name = {name: entry for entry in weights.ACCEPTED for name in entry.names}
    assert len(by_name) == 4
    for name, entry in by_name.items():
        prefix = re.search(r"-([0-9a-f]{8})\.pth", name)
        assert not prefix or entry.sha256.startswith(prefix[1])
        assert len(entry.sha256) == 64 or (len(entry.md5), entry.size) == (32, 95_673_916)


# Finding, verifying, keeping.


def refuse(data):
    pytest.fail("a file was parsed")


SOURCE = b"the weights"


def entries(to_state):
    entry = dataclasses.replace(weights.ACCEPTED[0], to_state=to_state)
    sha256 = hashlib.sha256(SOURCE).hexdigest()
    return (dataclasses.replace(entry, sha256=sha256, size=len(SOURCE)), *weights.ACCEPTED[1:])


def test_the_converted_file(tmp_path, params, caplog):
    source, cache = tmp_path / "renamed", tmp_path / "a" / "cache"
    source.write_bytes(SOURCE)
    once = entries(lambda data: params)
    first = weights.load_inception(str(source), str(cache), once)
    (converted,) = cache.iterdir()
    assert hashlib.sha256(SOURCE).hexdigest()[:16] in converted.name

    # Taken instead of the source, and enough without it.
    for path in (str(source), ""):
        again = weights.load_inception(path, str(cache), entries(refuse))
        assert_same(flat(again), flat(first))
        assert again[1:] == first[1:]
    # But only while its source is an accepted one.
    with pytest.raises(RequestError, match="no weights of the Inception network in"):
        weights.load_inception("", str(cache))

    # Damaged, it is made again.
    whole = converted.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1]):
        converted.write_bytes(damaged)
        with pytest.raises(RequestError, match="no weights of the Inception network in"):
            weights.load_inception("", str(cache), once)
    assert_same(flat(weights.load_inception(str(source), str(cache), once)), params)
    assert weights.load_inception("", str(cache), entries(refuse)).sha256 == first.sha256

    # Where nothing can be kept, the weights are still given.
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        loaded = weights.load_inception(str(source), str(tmp_path / "file" / "cache"), once)
    assert "cannot keep the converted weights there" in caplog.text
    assert loaded.has_logits


def other_entry(source, to_state, **changes):
    sha256 = hashlib.sha256(source).hexdigest()
    return weights.Accepted((f"{source.decode()}.file",), to_state, sha256, **changes)


@pytest.fixture
def tiny(monkeypatch):
    """The parameters of a network of three numbers, instead of 24 million."""
    whole = {"stem/kernel": np.ones((2, 1), np.float32), "fc/bias": np.zeros(1, np.float32)}

    def shapes(with_logits=True):
        return {k: v.shape for k, v in whole.items() if with_logits or k != "fc/bias"}

    monkeypatch.setattr(inception, "parameter_shapes", shapes)
    return whole


def test_two_converted_files(tmp_path, tiny):
    no_logits = {name: array for name, array in tiny.items() if not name.startswith("fc/")}
    accepted = (
        other_entry(b"whole", lambda data: tiny),
        other_entry(b"part", lambda data: no_logits, has_logits=False),
    )
    for order in ((b"whole", b"part"), (b"part", b"whole")):
        cache = tmp_path / order[0].decode()
        for source in order:
            (tmp_path / "file").write_bytes(source)
            weights.load_inception(str(tmp_path / "file"), str(cache), accepted)
        assert len(list(cache.iterdir())) == 2
        kept = weights.load_inception("", str(cache), accepted)
        assert kept.has_logits and kept.file_name == "whole.file"  # Good for more metrics.


def test_a_converted_file_under_the_name_of_another(tmp_path, tiny):
    changed = tiny | {"fc/bias": tiny["fc/bias"] + 1}
    accepted = (
        other_entry(b"one", lambda data: tiny),
        other_entry(b"two", lambda data: changed),
    )
    cache = tmp_path / "cache"
    for source in (b"one", b"two"):
        (tmp_path / source.decode()).write_bytes(source)
        weights.load_inception(str(tmp_path / source.decode()), str(cache), accepted)
    by_source = {
        source: next(cache.glob(f"*{hashlib.sha256(source).hexdigest()[:16]}*"))
        for source in (b"one", b"two")
    }
    by_source[b"two"].write_bytes(by_source[b"one"].read_bytes())
    loaded = weights.load_inception(str(tmp_path / "two"), str(cache), accepted)
    assert loaded.file_name == "two.file"
    assert_same(flat(loaded), changed)


def digest(state):
    """The checksum of the tensors, in the words of the file's format."""
    whole = hashlib.sha256()
    for name, array in sorted(state.items()):
        whole.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return whole.hexdigest()


def made(source):
    """What the converted file of this source says of itself."""
    return {"source": "a.file", "source_sha256": hashlib.sha256(source).hexdigest()}


@pytest.mark.parametrize(
    ("metadata", "change"),
    [
        *[({"has_logits": text}, {}) for text in ("[]", "null", "1", "[" * 10_000, "", "false")],
        *[({"tensors_sha256": "0" * 64}, {}), ({"source": None}, {}), (None, {})],
        *[({"source_sha256": "0" * 64}, {}), ({"source": "other.file"}, {})],
        *[({}, {"fc/bias": np.zeros(2, np.float32)}), ({}, {"more": np.zeros(1, np.float32)})],
    ],
)
def test_converted_files_that_are_wrong(tmp_path, tiny, metadata, change):
    accepted = (other_entry(b"a", refuse),)
    path = tmp_path / "inception-2015-12-05-0.safetensors"
    right = made(b"a") | {"has_logits": "true", "tensors_sha256": digest(tiny)}
    path.write_bytes(safetensors.save(tiny, right))
    assert_same(flat(weights.load_inception("", str(tmp_path), accepted)), tiny)

    state = tiny | change
    wrong = right | {"tensors_sha256": digest(state)} | (metadata or {})
    wrong = {name: text for name, text in wrong.items() if text is not None}
    path.write_bytes(safetensors.save(state, None if metadata is None else wrong))
    with pytest.raises(RequestError, match="no weights of the Inception network in"):
        weights.load_inception("", str(tmp_path), accepted)


def test_a_converted_file_that_says_nothing_of_itself(tmp_path):
    header = b'{"__metadata__":null}'
    path = tmp_path / "inception-2015-12-05-0.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(RequestError, match="no weights of the Inception network in"):
        weights.load_inception("", str(tmp_path))


def test_a_file_that_cannot_be_read(tmp_path):
    name = weights.ACCEPTED[1].names[0]
    (tmp_path / name).mkdir()  # A folder cannot, even by root.
    with pytest.raises(RequestError, match=f"{name} cannot be read") as raised:
        weights.load_inception(str(tmp_path), str(tmp_path / "cache"))
    message = str(raised.value)
    assert "\n" not in message and "--config.evaluation.weights=PATH" in message


def test_a_broken_file_of_a_known_checksum(tmp_path):
    (tmp_path / "file").write_bytes(SOURCE)
    for entry in weights.ACCEPTED:
        accepted = entries(entry.to_state)
        with pytest.raises(RequestError, match=r"file cannot be used: it is not a whole"):
            weights.load_inception(str(tmp_path / "file"), str(tmp_path), accepted)


@pytest.mark.parametrize("path", ["", "missing", "."])
def test_missing_files(tmp_path, path):
    path = path and str(tmp_path / path)
    with pytest.raises(RequestError) as raised:
        weights.load_inception(path, str(tmp_path / "cache"))
    message = str(raised.value)
    assert "\n" not in message and "--config.evaluation.weights=PATH" in message
    for entry in weights.ACCEPTED:
        assert entry.names[0] in message and (entry.sha256 or entry.md5) in message


@pytest.mark.parametrize("data", [SOURCE[:-1], SOURCE + b"!", b"THE weights", b""])
def test_other_or_damaged_files_are_never_parsed(tmp_path, data):
    accepted = entries(refuse)
    name = accepted[0].names[0]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RequestError) as raised:
        weights.load_inception(str(tmp_path), str(tmp_path), accepted)
    message = str(raised.value)
    assert "\n" not in message and str(tmp_path / name) in message
    assert f"{len(data)} bytes" in message and f"{len(SOURCE)} bytes" in message
    assert hashlib.sha256(data).hexdigest() in message and accepted[0].sha256 in message
    assert "classify_image" not in message


def test_a_file_known_by_md5_must_have_its_size_too(tmp_path):
    entry = dataclasses.replace(weights.ACCEPTED[1], md5=hashlib.md5(SOURCE).hexdigest(), size=1)
    (tmp_path / "file").write_bytes(SOURCE)
    with pytest.raises(RequestError, match="damaged or another file"):
        weights.load_inception(str(tmp_path / "file"), str(tmp_path), (entry,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Mixed_5b/branch1x1/bias": None}, "Mixed_5b/branch1x1/bias is missing"),
        ({"Mixed_9z/bias": np.zeros(1)}, "Mixed_9z/bias is not of the network"),
        (
            {"fc/bias": np.zeros(1000, np.float32)},
            r"fc/bias is float32 \(1000,\), not float32 \(1008,\)",
        ),
        ({"fc/bias": np.zeros(1008)}, r"fc/bias is float64 \(1008,\)"),
    ],
)
def test_weights_of_another_network(tmp_path, params, change, message):
    (tmp_path / "file").write_bytes(SOURCE)
    changed = {k: v for k, v in (params | change).items() if v is not None}
    with pytest.raises(RequestError, match=f"cannot be used: {message}"):
        weights.load_inception(str(tmp_path / "file"), str(tmp_path), entries(lambda data: changed))
