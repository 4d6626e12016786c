"""The users' weights: readers against their formats' own writers, checksums, the converted file."""

import base64
import dataclasses
import hashlib
import io
import logging
import pickle
import re
import zipfile
import zlib

import flax
import make_inception_golden as golden
import numpy as np
import pytest
from tensorboardX.proto import graph_pb2

from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import inception, weights

# What torch.save wrote of TORCH_STATE, before and since its zip format (zlib, base 85).
TORCH_LEGACY = (
    "c-n1}&2G~`5XaYRCn+W^rF@ppP^jcwBBxE0=0Z833TgR@x$Fg*)LCLzmN&Crw*skBE~$VM55R#VM;@WC!y_PZU>rxS"
    "BE{0*yE~rw&EI2>={Gz6_hbKW?eN#z^~RXK`eWk#1c<{|2_YjTwG3qJ9|@I4G64e<_%c3;BdufMi)0Y>6QEzXjY0is"
    "B>Xh`EK)E}z;bvAgJ~$0h7zOP#8Z@LC^L&&IYTBxs4y$buxEg6Vi9QUlG<<7KqxVI9tGM4Qun}cco{2>MKlaG&_GKS"
    "gbhE_QJmVo5(iln4}2|>R4V^y%LdbNcqQ+Snf;*vt0=MeW7*g5il7Z8zJfX3R&%@Qb~>G%R;$^D^3-TB%FtW&wT7i0"
    "GnmQDQ@Dg1>lEy-VeaX&hN=h4(`+S=VI{<-p%pHKUI`1>YL8jWn!r_NOkk}5UDI&ggB#On1v0}4-7HWu&o6OK=az3>"
    "(3|b;uDjFeZozG&8%SU8F;cG=)H@pPdT?(#>98Mvg!^;Q7Z^H+KA5w-+je(d7ak&%BD983Mknwnx4conA8UBx!Djy9"
    "-seBdf;To6G3g@rrf5{j-1U@@G3pFO_6Vt=o}oUV#;EV8pQzt^^rGU-m~AVw^*_g9wEF"
)
TORCH_ZIP = (
    "c-p0vzi-n(6vr=4;-sdeX(^NzDCNhHN|4$~nxs&g%0dRoNF+fZizRgvH@0x&o^xphER|4-*cg}*e*zn8cUVA_2_c~l"
    "h>3xPkvlteZC6Ru_M|6U)_uSCxx4qCi()VYKr{*tj5rtpvRPHNb!Da|BRRSDL>KrNc<dRQRJCg8x>7}&(P%RF&6;8="
    "wcA=1F%V3bVIU#V*la`5>MDX%6&ctvS!p3nZ!#5AS#D{1t%8(B(=aRRDFy};2`PdVO*~VsD==hB7(q8=^uYeez_1j+"
    "b67}ALHw+)wO~XXL@-(s17c7NZovWk654{yE0s{3Kya`OPg;{rV*|!iyo?%B!z!&>!l9BF5<_hm7XxiLY>P$^JXMCH"
    "Qkbk@v>FJWwq+fndq$(~0G+XbI5>v=0tlWhiC}u#_8CWTq72VT_?&?%>nrfQ$L22n<k(!WY*KI%+fWEz#5N+;hEoLV"
    "l5KYx!7F8WwUsQ2k?8KrPd}ey35jCYs~iK1&Q&H?40BaRm375z;wuyQdEbp5Zg7O+!=LXj2serD6cZq~Ptm#FimYq("
    "#;Vdl0-rt#NH#+N3LEe@g_odu0t|zK1F-xQDF#Vafxmg21JE^ubcHaqZ|#ngRHu6~#K3~5s%BV$zi|wJj_m>fn>e;{"
    ";7x)l9E&)XaBSjujpH4T_XR>~a7!(glusYhQ7<Vc@bLqrk<M)5yY}suL5!k(eCNHsDS^))`2_IJx5?Vsot-zNz(PIO"
    "9&%-XQvk=h|1?8Z|NOT8uz&tdg4BKiSX*x@riLrvnM}H8MXL#X@{llWJ~Nle=kuA|Ty~bt<a6m+mSyL1vmBera5<Js"
    "rSn;iwaT>c<L_z$b0jRv0D*Nl-HjxEfZYEd@T=VoV9cZZ7y#W`kKe>y#1kHq5(Rp64!@7P5QjZJUtB&;1Mth;)e-Z^"
    "9|eK0cKup+1$eb2F}>B~*Sa&<tCjrPlwa%4zafwIt4rJM++Arg=@FO1pijaUMVh|0m)^naj&i{FyhGW~f8o7$L0g@p"
    "&|$Fu9AVnl3|RB+x&HwT&E}8"
)
TABLE = np.arange(12, dtype=np.float32).reshape(3, 4) / 8
TORCH_STATE = {
    "weight": TABLE.T[1:],
    "row": TABLE[1],
    "count": np.array(7),
    "half": np.array([1.5, -2], np.float16),
}


def unpacked(text):
    return zlib.decompress(base64.b85decode(text))


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        np.testing.assert_array_equal(got[name], array)


# The readers.


@pytest.mark.parametrize("text", [TORCH_LEGACY, TORCH_ZIP])
def test_torch_files_are_read_without_torch(text):
    assert_same(weights.read_torch(unpacked(text)), TORCH_STATE)


@pytest.mark.parametrize("zipped", [False, True])
def test_torch_files_live(zipped):
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 2), torch.nn.BatchNorm2d(5))
    file = io.BytesIO()
    torch.save(network.state_dict(), file, _use_new_zipfile_serialization=zipped)
    expected = {name: array.numpy() for name, array in network.state_dict().items()}
    assert_same(weights.read_torch(file.getvalue()), expected)


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('harm was done')",)


def with_pickle(text, tree):
    """A zip file of torch's with another pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(unpacked(text))) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, tree if name.endswith("data.pkl") else old.read(name))
    return file.getvalue()


def test_code_in_files_is_refused():
    harm = pickle.dumps({"weight": Harmful()}, protocol=2)
    header = b"".join(
        pickle.dumps(part, protocol=2)
        for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    for read, data in [
        (weights.read_torch, with_pickle(TORCH_ZIP, harm)),
        (weights.read_torch, header + harm),
        (weights.read_pickle, harm),
        (weights.read_pickle, pickle.dumps(Harmful())),
    ]:
        with pytest.raises(ValueError, match=r"it asks to run (__builtin__|builtins)\.exec"):
            read(data)


@pytest.mark.parametrize("text", [TORCH_LEGACY, TORCH_ZIP])
def test_tensors_beyond_their_storage_are_refused(text):
    data = unpacked(text)
    if text == TORCH_LEGACY:
        data = data[:-1]
    else:
        tree = zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl")
        longer = tree.replace(b"K\x03K\x03\x86", b"K\x03K\x04\x86")
        assert b"K\x03K\x03\x86" in tree
        data = with_pickle(text, longer)
    with pytest.raises(ValueError, match=r"beyond its storage|storage is not whole"):
        weights.read_torch(data)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"anything else"])
def test_other_files_are_not_torchs(data):
    with pytest.raises(ValueError, match="not a whole file of PyTorch tensors"):
        weights.read_torch(data)


def add_constant(graph, name, array, values=None):
    node = graph.node.add(name=name, op="Const")
    node.attr["dtype"].type = 1
    tensor = node.attr["value"].tensor
    tensor.dtype = {"f": 1, "i": 3}[array.dtype.kind]
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    if values is None:
        tensor.tensor_content = array.tobytes()
    else:
        tensor.float_val.extend(values)


def test_constants_of_a_frozen_graph():
    graph = graph_pb2.GraphDef()
    graph.versions.producer = 8
    graph.node.add(name="image", op="Placeholder", input=["a", "b"], device="/cpu:0")
    table = np.arange(300, dtype=np.float32).reshape(2, 3, 50)
    add_constant(graph, "content", table)
    add_constant(graph, "listed", table[0], table[0].ravel())
    add_constant(graph, "one_for_all", table[:1], [2.5])
    add_constant(graph, "scalar", table[0, 0, 0], [7.0])
    add_constant(graph, "integers", np.arange(3))
    graph.node.add(name="conv", op="Conv2D").attr["strides"].list.i.extend([1, 2, 2, 1])
    data = graph.SerializeToString()
    expected = {
        "content": table,
        "listed": table[0],
        "one_for_all": np.full((1, 3, 50), 2.5, np.float32),
        "scalar": np.float32(7)[()].reshape(()),
    }
    assert_same(weights.read_graph(data), expected)
    with pytest.raises(ValueError, match="not a whole protocol buffer"):
        weights.read_graph(data[:-1])


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_of_arrays(protocol):
    tree = {"a": {"kernel": TABLE, "bias": TABLE.T[0]}, "b": np.float32([1])}
    if protocol == 2:  # Bytes are then a call of a codec.
        with pytest.raises(ValueError, match=r"_codecs\.encode"):
            weights.read_pickle(pickle.dumps(tree, protocol))
        return
    flat = flax.traverse_util.flatten_dict(weights.read_pickle(pickle.dumps(tree, protocol)))
    assert_same(flat, flax.traverse_util.flatten_dict(tree))


@pytest.mark.parametrize("tree", [TABLE, [TABLE], {"a": [1.0]}, {"a": TABLE.astype(np.float64)}])
def test_pickles_of_other_things(tree):
    with pytest.raises(ValueError, match="not nested dicts of float32 arrays"):
        weights.read_pickle(pickle.dumps(tree))


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
