"""The safetensors reader and writer against the reference package, and against malformed files."""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from einsum_transformer.errors import FormatError, InputError
from einsum_transformer.formats.safetensors import (
    SafetensorsFile,
    float32_to_bf16,
    write_safetensors,
)
from einsum_transformer.leaves.resident import converted

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def one_of_each() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {name: rng.integers(0, 2, (3, 5)).astype(dtype) for name, dtype in DTYPES.items()}
    return tensors | {"scalar": np.array(7, np.float32), "empty": np.zeros((0, 4), np.float16)}


def raw_file(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_every_type_survives_a_round_trip(tmp_path):
    tensors = one_of_each()
    write_safetensors(tmp_path / "t.safetensors", tensors)
    source = SafetensorsFile(tmp_path / "t.safetensors")
    assert source.metadata == {"format": "pt"}
    assert set(source.names()) == set(tensors)
    for name, tensor in tensors.items():
        got, info = source.read(name), source.info(name)
        assert (got.dtype, got.shape, got.tobytes()) == (tensor.dtype, tensor.shape, tensor.tobytes())
        assert (info.name, info.shape, info.nbytes) == (name, tensor.shape, tensor.nbytes)
        assert info.file.read_bytes()[info.offset : info.offset + info.nbytes] == tensor.tobytes()
        assert info.dtype == name or name in {"scalar", "empty"}


def test_the_reference_package_reads_what_we_write(tmp_path):
    tensors = one_of_each()
    write_safetensors(tmp_path / "t.safetensors", tensors)
    with safetensors.safe_open(tmp_path / "t.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    entries = dict(safetensors.deserialize((tmp_path / "t.safetensors").read_bytes()))
    assert set(entries) == set(tensors)
    for name, tensor in tensors.items():
        assert tuple(entries[name]["shape"]) == tensor.shape
        assert bytes(entries[name]["data"]) == tensor.tobytes()


def test_we_read_what_the_reference_package_writes(tmp_path):
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([True, False])}
    safetensors.numpy.save_file(tensors, tmp_path / "t.safetensors", {"format": "np"})
    source = SafetensorsFile(tmp_path / "t.safetensors")
    assert source.metadata == {"format": "np"}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor, strict=True)


def test_header_is_padded_and_tensors_are_aligned(tmp_path):
    write_safetensors(tmp_path / "t.safetensors", one_of_each())
    source = SafetensorsFile(tmp_path / "t.safetensors")
    header = int.from_bytes((tmp_path / "t.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0
    assert all(source.info(name).offset % source.read(name).itemsize == 0 for name in source.names())


def test_any_memory_layout_is_written_in_row_major_little_endian(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    tensors = {"t": base.T, "step": base[::2, ::-1], "big": base.astype(">f4"), "f": np.asfortranarray(base)}
    write_safetensors(tmp_path / "t.safetensors", tensors)
    source = SafetensorsFile(tmp_path / "t.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor)


def test_arrays_are_read_only_views_of_one_map(tmp_path):
    write_safetensors(tmp_path / "t.safetensors", {"x": np.ones((4, 4), np.float32)})
    source = SafetensorsFile(tmp_path / "t.safetensors")
    x = source.read("x")
    assert np.shares_memory(x, source.read("x"))
    assert not x.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        x.flags.writeable = True
    source.close()
    source.close()
    assert x.sum() == 16
    with pytest.raises(ValueError, match="closed"):
        source.read("x")


def test_unaligned_data_is_read(tmp_path):
    values = np.arange(3, dtype=np.float32)
    header = json.dumps({"x": entry(shape=[3], offsets=[0, 12])}).encode()
    header += b" " * (3 - len(header) % 4)  # 8 + header is then no multiple of 4
    (tmp_path / "t.safetensors").write_bytes(raw_file(header, values.tobytes()))
    source = SafetensorsFile(tmp_path / "t.safetensors")
    assert source.info("x").offset % 4
    np.testing.assert_array_equal(source.read("x"), values)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident size of a map from /proc")
def test_release_frees_the_pages_and_keeps_the_values(tmp_path):
    path = tmp_path / "t.safetensors"
    write_safetensors(path, {"a": np.ones(1 << 20, np.float32), "b": np.ones(1 << 20, np.float32)})
    source = SafetensorsFile(path)

    def resident_kilobytes() -> int:
        lines = Path("/proc/self/smaps").read_text().split(str(path))[1].splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

    assert source.read("a").sum() + source.read("b").sum() == 2 << 20
    assert resident_kilobytes() >= 8192
    source.release("a")
    assert 4096 <= resident_kilobytes() <= 4096 + 64
    assert source.read("a").sum() == 1 << 20


def test_unknown_tensor_names_the_file_and_the_nearest_name(tmp_path):
    path = tmp_path / "t.safetensors"
    x = np.zeros(1, np.float32)
    write_safetensors(path, {"model.layers.0.q_proj.weight": x, "model.norm.weight": x})
    source = SafetensorsFile(path)
    for use in (source.read, source.info, source.release):
        with pytest.raises(
            FormatError, match=r"t\.safetensors: .*layers\.0\.q_prj.*'model\.layers\.0\.q_proj"
        ):
            use("model.layers.0.q_prj.weight")


MALFORMED = {
    "empty": (b"", "empty"),
    "seven bytes": (b"\0" * 7, "too few"),
    "header longer than file": ((9).to_bytes(8, "little") + b"{}      ", "header of 9 bytes"),
    "header length 2^63": ((1 << 63).to_bytes(8, "little") + b"{}", "header of 9223372036854775808 bytes"),
    "no header": (raw_file(b""), "start with"),
    "leading space": (raw_file(b" {}"), "start with"),
    "list": (raw_file(b"[]"), "start with"),
    "padding that is not spaces": (raw_file(b"{}\n"), "start with"),
    "two objects": (raw_file(b"{}{}"), "not valid JSON"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "not valid JSON"),
    "lone surrogate": (raw_file(b'{"\\ud800": 1}'), "not valid JSON"),
    "deep nesting": (raw_file(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not valid JSON"),
    "endless integer": (raw_file(b'{"x":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "same tensor twice": (raw_file(b'{"x":{"dtype":"U8"},"x":{"dtype":"U8"}}'), "'x' occurs twice"),
    "same field twice": (raw_file(b'{"x":{"dtype":"U8","dtype":"I8"}}'), "'dtype' occurs twice"),
    "metadata not strings": (raw_file({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a list": (raw_file({"__metadata__": ["a"]}), "__metadata__"),
    "entry not an object": (raw_file({"x": [1]}), "'x': its header entry"),
    "missing field": (raw_file({"x": {"dtype": "U8", "shape": []}}), "exactly dtype"),
    "extra field": (raw_file({"x": entry() | {"more": 1}}, b"\0" * 8), "exactly dtype"),
    "unknown dtype": (raw_file({"x": entry("F7")}, b"\0" * 8), "'F7' is not one of F64"),
    "dtype not a string": (raw_file({"x": entry(["F32"])}, b"\0" * 8), "is not one of"),
    "negative dimension": (raw_file({"x": entry(shape=[-2])}, b"\0" * 8), "shape must be"),
    "float dimension": (raw_file({"x": entry(shape=[2.0])}, b"\0" * 8), "shape must be"),
    "bool dimension": (raw_file({"x": entry(shape=[2, True])}, b"\0" * 8), "shape must be"),
    "shape a number": (raw_file({"x": entry(shape=2)}, b"\0" * 8), "shape must be"),
    "65 dimensions": (raw_file({"x": entry(shape=[1] * 64 + [2])}, b"\0" * 8), "at most 64"),
    "overflowing shape": (raw_file({"x": entry(shape=[1 << 32, 1 << 32])}, b"\0" * 8), "too large"),
    "overflow beside a zero": (raw_file({"x": entry(shape=[0, 1 << 62, 9], offsets=[0, 0])}), "too large"),
    "too few bytes for shape": (raw_file({"x": entry(shape=[3])}, b"\0" * 8), "takes 12 bytes"),
    "offsets out of bounds": (raw_file({"x": entry()}, b"\0" * 7), "data_offsets must be"),
    "offsets reversed": (raw_file({"x": entry(offsets=[8, 0])}, b"\0" * 8), "data_offsets must be"),
    "negative offset": (raw_file({"x": entry(offsets=[-8, 0])}, b"\0" * 8), "data_offsets must be"),
    "bool offset": (raw_file({"x": entry("U8", [1], [False, 1])}, b"\0"), "data_offsets must be"),
    "three offsets": (raw_file({"x": entry(offsets=[0, 4, 8])}, b"\0" * 8), "data_offsets must be"),
    "hole": (raw_file({"x": entry(), "y": entry(offsets=[9, 17])}, b"\0" * 17), "'y' has unused bytes"),
    "overlap": (raw_file({"x": entry(), "y": entry(offsets=[4, 12])}, b"\0" * 12), "'y' overlaps"),
    "same bytes twice": (raw_file({"x": entry(), "y": entry()}, b"\0" * 8), "overlaps"),
    "hole at the start": (raw_file({"x": entry(offsets=[1, 9])}, b"\0" * 9), "has unused bytes"),
    "bytes after the end": (raw_file({"x": entry()}, b"\0" * 9), "last 1 bytes"),
}


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_files_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as refusal:
        SafetensorsFile(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_header_over_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{")
        file.truncate(200_000_000)  # sparse
    with pytest.raises(FormatError, match="exceeds 100000000"):
        SafetensorsFile(path)


def test_bool_bytes_other_than_0_and_1_are_refused(tmp_path):
    (tmp_path / "t.safetensors").write_bytes(raw_file({"x": entry("BOOL", [2], [0, 2])}, b"\1\2"))
    with pytest.raises(FormatError, match="'x' is BOOL"):
        SafetensorsFile(tmp_path / "t.safetensors").read("x")


def test_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        SafetensorsFile(tmp_path / "absent.safetensors")


def small_file(tmp_path: Path) -> bytes:
    tensors = {
        "a": np.arange(5, dtype=np.float32),
        "b": np.array([True]),
        "c": np.ones(3, ml_dtypes.bfloat16),
    }
    write_safetensors(tmp_path / "small.safetensors", tensors)
    return (tmp_path / "small.safetensors").read_bytes()


def read_all(path: Path) -> None:
    source = SafetensorsFile(path)
    for name in source.names():
        source.read(name).tobytes()
    source.close()


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    whole, path = small_file(tmp_path), tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            SafetensorsFile(path)


def test_flipped_bytes_are_read_or_refused(tmp_path):
    rng, path = np.random.default_rng(1), tmp_path / "flipped.safetensors"
    whole = np.frombuffer(small_file(tmp_path), np.uint8)
    refused = 0
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), rng.integers(1, 4))] ^= rng.integers(1, 256, dtype=np.uint8)
        path.write_bytes(damaged.tobytes())
        try:
            read_all(path)
        except FormatError:
            refused += 1
    assert 0 < refused < 300


class Failing(dict[str, np.ndarray]):
    """Answers twice for its shapes, and then fails in the middle of writing."""

    accesses = 0

    def __getitem__(self, name: str) -> np.ndarray:
        self.accesses += 1
        if self.accesses > 3:
            raise RuntimeError("the disk of the other machine is gone")
        return super().__getitem__(name)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "t.safetensors"
    write_safetensors(path, {"x": np.zeros(2, np.float32)})
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="gone"):
        write_safetensors(path, Failing(x=np.ones(2, np.float32), y=np.ones(2, np.float32)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": np.zeros(1, np.complex64)}, "'x': safetensors does not support complex64"),
        ({"x": np.array([None])}, "not support object"),
        ({"x": [1.0]}, "not support list"),
        ({"__metadata__": np.zeros(1)}, "not a valid tensor name"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, tensors, message):
    with pytest.raises(InputError, match=message):
        write_safetensors(tmp_path / "t.safetensors", tensors)
    assert not list(tmp_path.iterdir())


def test_a_map_stays_valid_when_its_file_is_replaced(tmp_path):
    path = tmp_path / "t.safetensors"
    write_safetensors(path, {"x": np.arange(4.0)})
    old = SafetensorsFile(path)
    write_safetensors(path, {"x": old.read("x") + 1})
    np.testing.assert_array_equal(old.read("x"), np.arange(4.0))
    np.testing.assert_array_equal(SafetensorsFile(path).read("x"), np.arange(4.0) + 1)


def test_all_bfloat16_patterns_survive_load_widen_narrow_save(tmp_path):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    (first).write_bytes(raw_file({"x": entry("BF16", [256, 256], [0, 1 << 17])}, patterns.tobytes()))
    wide = converted(SafetensorsFile(first).read("x"), np.dtype(np.float32))
    np.testing.assert_array_equal(wide.view(np.uint32).ravel(), patterns.astype(np.uint32) << 16)
    write_safetensors(second, {"x": float32_to_bf16(wide)})
    np.testing.assert_array_equal(SafetensorsFile(second).read("x").view(np.uint16).ravel(), patterns)


def test_narrowing_rounds_to_nearest_even():
    bits = np.random.default_rng(2).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    halves = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x00000001], np.uint32)
    x = np.concatenate([halves, bits]).view(np.float32)
    x = x[~np.isnan(x)]
    wide = x.view(np.uint32).astype(np.uint64)
    want = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16
    np.testing.assert_array_equal(float32_to_bf16(x).view(np.uint16), want)


def test_narrowing_keeps_a_nan_a_nan_in_any_layout():
    x = np.array([[0x7F800001, 0xFF800001, 0x7FC12345, 0x3F800000]], np.uint32).view(np.float32)
    want = np.array([[0x7FC0, 0xFFC0, 0x7FC1, 0x3F80]], np.uint16)
    np.testing.assert_array_equal(float32_to_bf16(x).view(np.uint16), want)
    np.testing.assert_array_equal(float32_to_bf16(x.T).view(np.uint16), want.T)
    assert float32_to_bf16(x[0, :1].reshape(())).view(np.uint16) == 0x7FC0
