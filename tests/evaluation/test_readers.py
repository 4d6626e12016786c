"""Readers of weights' files against the formats' own writers, and files that were made to harm."""

import base64
import copy
import io
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from typing import Any, NamedTuple

import flax
import numpy as np
import pytest
from tensorboardX.proto import graph_pb2

from ddpm_jax.evaluation import readers

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


@pytest.mark.parametrize("text", [TORCH_LEGACY, TORCH_ZIP])
def test_torch_files_are_read_without_torch(text):
    assert_same(readers.read_torch(unpacked(text)), TORCH_STATE)


@pytest.mark.parametrize("zipped", [False, True])
def test_torch_files_live(zipped):
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 2), torch.nn.BatchNorm2d(5))
    file = io.BytesIO()
    torch.save(network.state_dict(), file, _use_new_zipfile_serialization=zipped)
    expected = {name: array.numpy() for name, array in network.state_dict().items()}
    assert_same(readers.read_torch(file.getvalue()), expected)


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
        (readers.read_torch, with_pickle(TORCH_ZIP, harm)),
        (readers.read_torch, header + harm),
        (readers.read_pickle, harm),
        (readers.read_pickle, pickle.dumps(Harmful())),
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
        readers.read_torch(data)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"anything else"])
def test_other_files_are_not_torchs(data):
    with pytest.raises(ValueError, match="not a whole file of PyTorch tensors"):
        readers.read_torch(data)


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
    assert_same(readers.read_graph(data), expected)
    with pytest.raises(ValueError, match="not a whole protocol buffer"):
        readers.read_graph(data[:-1])


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_of_arrays(protocol):
    tree = {"a": {"kernel": TABLE, "bias": TABLE.T[0]}, "b": np.float32([1])}
    if protocol == 2:  # Bytes are then a call of a codec.
        with pytest.raises(ValueError, match=r"_codecs\.encode"):
            readers.read_pickle(pickle.dumps(tree, protocol))
        return
    flat = flax.traverse_util.flatten_dict(readers.read_pickle(pickle.dumps(tree, protocol)))
    assert_same(flat, flax.traverse_util.flatten_dict(tree))


@pytest.mark.parametrize("tree", [TABLE, [TABLE], {"a": [1.0]}, {"a": TABLE.astype(np.float64)}])
def test_pickles_of_other_things(tree):
    with pytest.raises(ValueError, match="not nested dicts of float32 arrays"):
        readers.read_pickle(pickle.dumps(tree))


# Files that were made to harm.


class Named(NamedTuple):
    """A class or function, by name."""

    name: str


class Call(NamedTuple):
    """A call of it, and perhaps a state for the result."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


class Stored(NamedTuple):
    """A thing that is kept elsewhere, by its id."""

    pid: Any


def opcodes(thing):
    """The pickle machine's instructions that build the thing."""
    match thing:
        case Named(name):
            return "c{}\n{}\n".format(*name.rsplit(".", 1)).encode()
        case Call(name, args, state):
            made = opcodes(Named(name)) + opcodes(args) + b"R"
            return made if state is None else made + opcodes(state) + b"b"
        case Stored(pid):
            return opcodes(pid) + b"Q"
        case tuple():
            return b"(" + b"".join(map(opcodes, thing)) + b"t"
        case dict():
            items = (opcodes(name) + opcodes(value) + b"s" for name, value in thing.items())
            return b"}" + b"".join(items)
    return pickle.dumps(thing, 3)[2:-1]


def crafted(thing):
    return b"\x80\x03" + opcodes(thing) + b"."


def storage(kind="Float", count=4, *view):
    return Stored(("storage", Named(f"torch.{kind}Storage"), "0", "cpu", count, *view))


def tensor(shape=(2, 2), strides=(2, 1), offset=0, stored=None):
    args = (storage() if stored is None else stored, offset, shape, strides, False, {})
    return Call("torch._utils._rebuild_tensor_v2", args)


def zip_file(tree, content, members=None, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", crafted(tree))
        archive.writestr("archive/data/0", content)
        for name, value in (members or {}).items():
            archive.writestr(f"archive/{name}", value)
    return file.getvalue()


def legacy_file(tree, content, little_endian=True, count=4):
    header = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": little_endian})
    parts = [*map(crafted, (*header, tree)), pickle.dumps(["0"], 2)]
    return b"".join(parts) + struct.pack("<q", count) + content


FOUR = np.array([1, 2, 3, 4], "<f4").tobytes()


@pytest.mark.parametrize("file", [zip_file, legacy_file])
def test_crafted_files_are_right_where_nothing_is_wrong(file):
    tree = {
        "whole": tensor(),
        "turned": tensor(strides=(1, 2)),
        "row": tensor((2,), (1,), 2),
        "one": tensor((1, 3), (0, 1)),
        "scalar": tensor((), (), 3),
        "empty": tensor((0, 3), (3, 1)),
    }
    expected = {
        "whole": [[1, 2], [3, 4]],
        "turned": [[1, 3], [2, 4]],
        "row": [3, 4],
        "one": [[1, 2, 3]],
        "scalar": 4,
        "empty": np.zeros((0, 3)),
    }
    expected = {name: np.array(array, np.float32) for name, array in expected.items()}
    assert_same(readers.read_torch(file(tree, FOUR)), expected)


@pytest.mark.parametrize("file", [zip_file, legacy_file])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("Double", "<f8"), ("Half", "<f2"), ("Int", "<i4"), ("Long", "<i8")]
)
def test_torch_files_of_each_dtype(file, kind, dtype):
    array = np.array([[1, -2], [3, 4]], dtype)
    tree = {"array": tensor(stored=storage(kind))}
    assert_same(readers.read_torch(file(tree, array.tobytes())), {"array": array})


@pytest.mark.parametrize("file", [zip_file, legacy_file])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (tensor((2,), (1,), -1), "sizes that are none"),
        (tensor((2,), (-1,), 3), "sizes that are none"),
        (tensor((2, 2), (1, -1), 1), "sizes that are none"),
        (tensor((-1000, 1000), (1, 1)), "sizes that are none"),
        (tensor((-2, -2), (1, 1)), "sizes that are none"),
        (tensor((2.0,), (1,)), "sizes that are none"),
        (tensor((2,), (1,), 0.5), "sizes that are none"),
        (tensor([4], (1,)), "sizes that are none"),
        (tensor((10**12,), (0,)), "beyond its storage"),
        (tensor((2,), (0,)), "beyond its storage"),
        (tensor((2, 3), (1, 1)), "beyond its storage"),
        (tensor((3, 1), (2, 1)), "beyond its storage"),
        (tensor((4,), (1,), 1), "beyond its storage"),
        (tensor((1,), (1,), 4), "beyond its storage"),
        (tensor((1,), (1,), 10**30), "beyond its storage"),
        (tensor((0, 10**9), (1, 1)), "beyond its storage"),
        (tensor((2, 2), (1,)), "not a whole file"),
        (tensor(stored=storage(count=5)), "storage is not whole"),
        (tensor(stored=storage("Double")), "storage is not whole"),
        (tensor(stored=storage("Float", 4, ("1", 0, 4))), "unknown kind"),
        (tensor(stored=storage("Float", 4.0)), "unknown kind"),
        (tensor(stored=Stored(("module", 0, "0", "cpu", 4))), "unknown kind"),
        (tensor(stored=Stored(1)), "not a whole file"),
        (tensor(stored=4), "not a whole file"),
        (Call("torch.FloatStorage", tensor().args), "not a whole file|storage is not whole"),
        (Call("torch._utils._rebuild_tensor_v2", ()), "not a whole file"),
        (5, "not a whole file"),
    ],
)
def test_wrong_tensors_are_refused(file, wrong, message):
    with pytest.raises(ValueError, match=message) as raised:
        readers.read_torch(file({"name": wrong}, FOUR))
    assert "\n" not in str(raised.value)


def test_wrong_files_of_torchs_are_refused():
    tree = {"name": tensor()}
    for data, message in [
        (legacy_file(tree, FOUR, little_endian=False), "unknown format"),
        (legacy_file(tree, FOUR, count=-1), "storage is not whole"),
        (legacy_file(tree, FOUR, count=2**62), "storage is not whole"),
        (legacy_file(tree, FOUR[:-1]), "storage is not whole"),
        (zip_file(tree, FOUR, {"byteorder": "big"}), "big-endian"),
        (zip_file(tree, FOUR[:-1]), "storage is not whole"),
        (zip_file(tree, FOUR, compression=zipfile.ZIP_DEFLATED), "compressed"),
        (zip_file({3: tensor()}, FOUR), "a name that is no text"),
        (zip_file((tensor(),), FOUR), "not a whole file"),
        (zip_file(4, FOUR), "not a whole file"),
    ]:
        with pytest.raises(ValueError, match=message):
            readers.read_torch(data)
    assert readers.read_torch(zip_file(tree, FOUR, {"byteorder": "little"}))


def peak(read, data):
    """The most memory, in bytes, that a reader takes at once for a file that it refuses."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^it |^a tensor"):
            read(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_taken_for_what_is_there():
    tree, much = {"name": tensor()}, bytes(20_000_000)
    deflated = zip_file(tree, FOUR, {"data/1": much}, zipfile.ZIP_DEFLATED)
    doubled = io.BytesIO(zip_file(tree, FOUR, {"data/1": bytes(100_000)}))
    with zipfile.ZipFile(doubled, "a") as archive:
        archive.writestr("archive/version", "3")  # So that the directory is written anew.
        archive.filelist += [copy.copy(archive.getinfo("archive/data/1"))]
    with pytest.raises(ValueError, match="members are larger than itself"):
        readers.read_torch(doubled.getvalue())
    for read, data in [
        (readers.read_torch, deflated),
        (readers.read_torch, zip_file(tree, FOUR * 10_000)),
        (readers.read_graph, constant(10**6, 10**6)),
        (readers.read_graph, constant(2**32, 2**32)),
        (readers.read_graph, constant(2**64 - 1)),
        (readers.read_graph, b"\x0a\x06\x10" + bytes([255, 255, 255, 15]) + b"\0"),
        (readers.read_pickle, b"\x80\x02}r" + struct.pack("<I", 10**7) + b"."),
        (readers.read_pickle, crafted({"a": Call("numpy.ndarray", ((10**7,), "f4"))})),
    ]:
        assert peak(read, data) < 2_000_000 + 4 * len(data)


def constant(*dims):
    """A graph with one constant of this shape and one value."""
    graph = graph_pb2.GraphDef()
    add_constant(graph, "name", np.float32(0), [1.0])
    shape = graph.node[0].attr["value"].tensor.tensor_shape
    for size in dims:
        shape.dim.add(size=size - 2**64 if size >= 2**63 else size)
    return graph.SerializeToString()


def test_wrong_graphs_are_refused():
    graph = graph_pb2.GraphDef()
    add_constant(graph, "name", np.zeros(3, np.float32), [1.0, 2.0])
    other_size = graph.SerializeToString()
    for data, message in [
        (other_size, "another size"),
        (constant(2**22 + 1), "another size"),
        (b"\x0a\x07\x12\x05Const", "not a whole graph"),
        (b"\x08\x01", "not a whole graph"),
        (b"\x0a\x02\x10\x05", "not a whole graph"),
        (b"\x90" + b"\x80" * 10 + b"\x00\x01", "not a whole protocol buffer"),
        (b"PK anything else", "not a whole protocol buffer"),
    ]:
        with pytest.raises(ValueError, match=message):
            readers.read_graph(data)
    assert readers.read_graph(constant(2**20))["name"].shape == (2**20,)


FLOAT32 = Call("numpy.dtype", ("f4", False, True), (3, "<", None, None, None, -1, -1, 0))


def float32_with(**changes):
    """A float32 that a pickle changed into something else."""
    names = ("version", "order", "parts", "names", "fields", "size", "alignment", "flags")
    state = dict(zip(names, FLOAT32.state, strict=True)) | changes
    return FLOAT32._replace(state=tuple(state.values()))


def buffer_array(shape=(2, 2), dtype=FLOAT32, content=FOUR, order="C"):
    return Call("numpy._core.numeric._frombuffer", (content, dtype, shape, order))


def built_array(shape=(2, 2), dtype=FLOAT32, content=FOUR, transposed=False, version=1):
    args = (Named("numpy.ndarray"), (0,), b"b")
    state = (version, shape, dtype, transposed, content)
    return Call("numpy._core.multiarray._reconstruct", args, state)


def test_crafted_pickles_are_right_where_nothing_is_wrong():
    expected = np.array([[1, 2], [3, 4]], np.float32)
    for array, known in [
        (buffer_array(), expected),
        (buffer_array(order="F"), expected.T),
        (built_array(), expected),
        (built_array(transposed=True), expected.T),
    ]:
        assert_same(readers.read_pickle(crafted({"a": array})), {"a": known})


OBJECT = Call("numpy.dtype", ("O8", False, True))


@pytest.mark.parametrize("make", [buffer_array, built_array])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": float32_with(parts=(Call("numpy.dtype", ("f4",)), (10**6,)))}, "float32 arrays"),
        ({"dtype": float32_with(names=("a",), fields={"a": (OBJECT, 0)})}, "float32 arrays"),
        ({"dtype": float32_with(flags=63)}, "float32 arrays"),
        ({"dtype": float32_with(order=">")}, "float32 arrays"),
        ({"dtype": float32_with(size=10**6)}, "float32 arrays"),
        ({"dtype": FLOAT32._replace(args=("O", False, True))}, "float32 arrays"),
        ({"dtype": FLOAT32._replace(args=("f8", False, True))}, "float32 arrays"),
        ({"dtype": FLOAT32._replace(name="numpy.ndarray")}, "float32 arrays"),
        ({"dtype": "f4"}, "float32 arrays"),
        ({"shape": (10**9,)}, "not whole"),
        ({"shape": (3,)}, "not whole"),
        ({"shape": (5,)}, "not whole"),
        ({"shape": (-2, -2)}, "sizes that are none"),
        ({"shape": (2.0, 2)}, "sizes that are none"),
        ({"shape": 4}, "sizes that are none"),
        ({"content": "text of 16 bytes"}, "not whole"),
        ({"content": FOUR[:-1]}, "not whole"),
    ],
)
def test_wrong_arrays_are_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        readers.read_pickle(crafted({"a": make(**changes)}))


def test_wrong_pickles_are_refused():
    whole = pickle.dumps({"a": TABLE})
    self_made = b"\x80\x02}q\x00X\x01\0\0\0ah\x00s."
    for data, message in [
        (b"", "not a whole pickle"),
        (whole[:-20], "not a whole pickle"),
        (b"anything else", "not a whole pickle"),
        (self_made, "a dict in two places"),
        (crafted({"a": Call("numpy.ndarray", ((4,), FLOAT32))}), "float32 arrays"),
        (crafted({"a": Call("numpy.ndarray", ((4,), FLOAT32, FOUR, 0, (100,)))}), "float32 arrays"),
        (crafted({"a": Named("numpy.ndarray")}), "float32 arrays"),
        (crafted({"a": built_array(version=9)._replace(state=None)}), "not a whole pickle"),
        (crafted({1: buffer_array()}), "a name that is no text"),
        (crafted({"a": storage()}), r"asks to run torch\.FloatStorage"),
    ]:
        with pytest.raises(ValueError, match=message):
            readers.read_pickle(data)
