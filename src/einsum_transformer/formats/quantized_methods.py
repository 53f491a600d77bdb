"""The ways in which other programs store quantized matrices in safetensors folders.

config.json names the method (`quantization_config`, or `quantization` of MLX), and several tensors hold one
matrix: `X.qweight`, `X.scales` and `X.qzeros` are `X.weight`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import numpy as np

from einsum_transformer.errors import FormatError
from einsum_transformer.formats import TensorInfo
from einsum_transformer.formats.encodings import Encoding, Floats, Integers, unpacked
from einsum_transformer.formats.mapped import quoted

Array = np.ndarray
Infos = Mapping[str, TensorInfo]
Read = Callable[[str, slice | None], Array]
"""(part, rows) -> those rows of the tensor of a part; None: the tensor."""

_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Form:
    """The shape (rows, width) and the encoding of a matrix."""

    shape: tuple[int, int]
    encoding: Encoding
    block_rows: int = 1
    """Rows that share a row of scales."""


class Method(ABC):
    """A way of storing quantized matrices. settings: those of config.json."""

    label: ClassVar[str]
    """Name in messages, and the type of its tensors."""
    suffixes: ClassVar[Mapping[str, str]]
    """Part -> what replaces `weight` in the name of its tensor. The first part is always present."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Parts that can be absent."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Last names of tensors without an effect on the values of the weights."""

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        self.settings: Mapping[str, Any] = settings
        self.where: str = where

    @property
    def activations(self) -> bool:
        """Whether the format also describes quantized activations, which are not applied."""
        return False

    def error(self, reason: str) -> FormatError:
        return FormatError(f"{self.where}: {reason}")

    def is_quantized(self, infos: Infos) -> bool:
        """Whether these tensors, of which the first is present, are a quantized matrix."""
        return True

    @abstractmethod
    def form(self, infos: Infos, read: Read) -> Form:
        """Return the form of a matrix, after checking the shapes and types of its tensors. read: for tensors
        of a few numbers."""

    @abstractmethod
    def parts(self, form: Form, read: Read, rows: slice) -> dict[str, Array]:
        """Return the parts of some rows of the matrix, see `encodings`."""

    def group_size(self, value: Any) -> int:
        """Return a `group_size`; 0 for -1, which is a group per row."""
        if value == -1 or _is_count(value):
            return max(value, 0)
        raise self.error(f"group_size is {value!r:.40}: expected a number of columns, or -1")

    def columns(self, form: Form, columns: Array, groups: int) -> dict[str, Array]:
        """The groups of the columns as a part, unless they are consecutive columns or not given."""
        assert isinstance(form.encoding, Integers)
        if not columns.size or np.array_equal(columns, np.arange(len(columns)) // form.encoding.size):
            return {}
        if columns.min() < 0 or columns.max() >= groups:
            raise self.error(f"{self.suffixes['columns']} has a group outside of 0 to {groups - 1}")
        return {"columns": columns.astype(np.int32)}

    def expect(self, info: TensorInfo, types: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
        """Raise FormatError unless a tensor has one of the types and one of the shapes."""
        if info.dtype not in types or (shapes and info.shape not in shapes):
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise FormatError(
                f"{info.file}: {quoted(info.name)} is {info.dtype} {list(info.shape)}, but {self.label} "
                f"requires {' or '.join(types)} {expected}".rstrip()
            )

    def matrix(self, info: TensorInfo, types: tuple[str, ...]) -> tuple[int, int]:
        """Return the shape of a tensor with two axes and one of the types."""
        self.expect(info, types)
        if len(info.shape) != 2 or 0 in info.shape:
            raise FormatError(f"{info.file}: {quoted(info.name)} is {list(info.shape)}, not a matrix")
        return info.shape[0], info.shape[1]


class Fp8(Method):
    """DeepSeek's and Qwen's float8: a scale for each block of 128 x 128 elements, or one for the matrix.

    weight: F8_E4M3 (n, k). weight_scale_inv: (ceil(n / 128), ceil(k / 128)), or one number.
    """

    label: ClassVar[str] = "FP8"
    suffixes: ClassVar[Mapping[str, str]] = {"codes": "weight", "scales": "weight_scale_inv"}
    unused: ClassVar[tuple[str, ...]] = ("activation_scale", "input_scale")

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        super().__init__(settings, where)
        block = settings.get("weight_block_size", [128, 128])
        self._block: tuple[int, int] | None = None
        if block is None:
            return
        if not isinstance(block, list) or len(block) != 2 or not all(_is_count(each) for each in block):
            raise self.error(f"weight_block_size is {block!r:.60}: expected two numbers")
        self._block = (block[0], block[1])

    @property
    def activations(self) -> bool:
        return "activation_scheme" in self.settings

    def is_quantized(self, infos: Infos) -> bool:
        return infos["codes"].dtype == "F8_E4M3"

    def form(self, infos: Infos, read: Read) -> Form:
        n, k = self.matrix(infos["codes"], ("F8_E4M3",))
        if self._block is None:
            self.expect(infos["scales"], (*_FLOATS, "F8_E8M0"), (), (1,), (1, 1))
            return Form((n, k), Floats(self.label, 8, k, k))
        rows, columns = self._block
        self.expect(infos["scales"], (*_FLOATS, "F8_E8M0"), (-(-n // rows), -(-k // columns)))
        return Form((n, k), Floats(self.label, 8, k, columns), rows)

    def parts(self, form: Form, read: Read, rows: slice) -> dict[str, Array]:
        scales = read("scales", None)
        scales = scales.view(np.uint8) if scales.dtype.itemsize == 1 else scales
        return {"codes": read("codes", rows).view(np.uint8), "scales": _of_rows(scales, form, rows)}


class Gptq(Method):
    """GPTQ: integers in words of 32 bits along the inputs, with the zero points along the outputs.

    qweight: I32 (k * bits / 32, n). qzeros: I32 (groups, n * bits / 32), minus 1 unless `checkpoint_format`
    is gptq_v2. scales: (groups, n). g_idx: I32 (k), the group of each column.
    """

    label: ClassVar[str] = "GPTQ"
    suffixes: ClassVar[Mapping[str, str]] = {
        "codes": "qweight",
        "zeros": "qzeros",
        "scales": "scales",
        "columns": "g_idx",
    }
    optional: ClassVar[tuple[str, ...]] = ("columns",)

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        super().__init__(settings, where)
        bits = settings.get("bits")
        if not _is_count(bits) or bits not in (2, 4, 8):
            raise self.error(f"bits is {bits!r:.40}: GPTQ with 2, 4 or 8 bits is supported")
        self._bits, self._size = bits, self.group_size(settings.get("group_size"))
        if settings.get("dynamic"):
            raise self.error(
                "quantization_config has `dynamic` settings for single modules, which are not supported"
            )
        version = settings.get("checkpoint_format", "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise self.error(f"checkpoint_format is {version!r:.40}: expected gptq or gptq_v2")
        self._offset = int(version == "gptq")

    def form(self, infos: Infos, read: Read) -> Form:
        words, n = self.matrix(infos["codes"], ("I32",))
        k = words * 32 // self._bits
        size = self._size or k
        groups = -(-k // size)
        self.expect(infos["scales"], _FLOATS, (groups, n))
        self.expect(infos["zeros"], ("I32",), (groups, n * self._bits // 32))
        if n * self._bits % 32:
            raise self.error(f"{quoted(infos['codes'].name)}: {n} rows do not fill words of 32 bits")
        if "columns" in infos:
            self.expect(infos["columns"], ("I32", "I64"), (k,))
        return Form((n, k), Integers(self.label, self._bits, k, size))

    def parts(self, form: Form, read: Read, rows: slice) -> dict[str, Array]:
        # Words along the inputs become bytes of a row.
        codes = np.ascontiguousarray(read("codes", None)[:, rows].T).view(np.uint8)
        own = slice(rows.start * self._bits // 32, -(-rows.stop * self._bits // 32))
        words = np.ascontiguousarray(read("zeros", None)[:, own]).view(np.uint8)
        first = own.start * 32 // self._bits
        zeros = unpacked(words, self._bits, words.shape[1] * 8 // self._bits)
        zeros = zeros[:, rows.start - first : rows.stop - first].T.astype(_zero_type(self._bits))
        scales = np.ascontiguousarray(read("scales", None)[:, rows].T)
        parts = {"codes": codes, "scales": scales, "zeros": zeros + zeros.dtype.type(self._offset)}
        return parts | self.columns(form, read("columns", None), scales.shape[1])


class Awq(Method):
    """AWQ (gemm): 4-bit integers in words of 32 bits along the outputs, in the order 0 2 4 6 1 3 5 7.

    qweight: I32 (k, n / 8). qzeros: I32 (groups, n / 8). scales: (groups, n).
    """

    label: ClassVar[str] = "AWQ"
    suffixes: ClassVar[Mapping[str, str]] = {"codes": "qweight", "zeros": "qzeros", "scales": "scales"}

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        super().__init__(settings, where)
        bits = settings.get("bits", settings.get("w_bit", 4))
        self._size = self.group_size(settings.get("group_size", settings.get("q_group_size", 128)))
        version = str(settings.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise self.error(
                f"AWQ with {bits!r:.20} bits, version {version!r:.20}: 4 bits and gemm are supported"
            )

    def form(self, infos: Infos, read: Read) -> Form:
        k, words = self.matrix(infos["codes"], ("I32",))
        size = self._size or k
        groups = -(-k // size)
        self.expect(infos["scales"], _FLOATS, (groups, words * 8))
        self.expect(infos["zeros"], ("I32",), (groups, words))
        return Form((words * 8, k), Integers(self.label, 4, k, size))

    def parts(self, form: Form, read: Read, rows: slice) -> dict[str, Array]:
        def columns(part: str) -> Array:
            """The 4-bit integers of `rows`, which are columns of the tensor: uint8 (rows, ...)."""
            first = rows.start // 8
            words = np.ascontiguousarray(read(part, None)[:, first : -(-rows.stop // 8)])
            codes = unpacked(words.view(np.uint8), 4, words.shape[1] * 8).reshape(len(words), -1, 8)
            ordered = codes[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(len(words), -1)
            return ordered[:, rows.start - 8 * first : rows.stop - 8 * first].T

        codes = columns("codes")
        return {
            "codes": codes[:, ::2] | codes[:, 1::2] << 4,
            "scales": np.ascontiguousarray(read("scales", None)[:, rows].T),
            "zeros": columns("zeros").astype(_zero_type(4)),
        }


class CompressedTensors(Method):
    """compressed-tensors: integers in words of 32 bits (pack-quantized), int8, float8, or floats of 4 bits.

    weight_packed: I32 (n, ceil(k * bits / 32)), stored as value + 2^(bits - 1), or U8 (n, k / 2) of E2M1.
    weight: I8 or F8_E4M3 (n, k). weight_scale: (n, groups), (n, 1), one number, or (blocks, blocks); of
    E2M1: F8_E4M3 with the divisor weight_global_scale, or U8 exponents. weight_zero_point: I32
    (ceil(n * bits / 32), groups), packed along the rows, or I8 (n, groups).
    """

    label: ClassVar[str] = "compressed-tensors"
    suffixes: ClassVar[Mapping[str, str]] = {
        "packed": "weight_packed",
        "codes": "weight",
        "scales": "weight_scale",
        "zeros": "weight_zero_point",
        "columns": "weight_g_idx",
        "shape": "weight_shape",
        "divisor": "weight_global_scale",
    }
    optional: ClassVar[tuple[str, ...]] = ("packed", "codes", "zeros", "columns", "shape", "divisor")
    unused: ClassVar[tuple[str, ...]] = (
        *("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
        *("k_scale", "v_scale", "q_scale", "weight_observer"),
    )

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        super().__init__(settings, where)
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(each, dict) for each in groups.values()):
            raise self.error("quantization_config has no `config_groups`")
        weights = [each.get("weights") for each in groups.values()]
        self._weights = [each for each in weights if isinstance(each, dict)]
        self._inputs = any(each.get("input_activations") for each in groups.values())
        status = settings.get("quantization_status", "compressed")
        if status != "compressed":
            raise self.error(f"quantization_status is {status!r:.40}: the weights are not compressed")
        for name in ("sparsity_config", "transform_config"):
            value = settings.get(name)
            if value and not (name == "sparsity_config" and value.get("format", "dense") == "dense"):
                raise self.error(f"quantization_config has a `{name}`, which is not supported")

    @property
    def activations(self) -> bool:
        return self._inputs

    def is_quantized(self, infos: Infos) -> bool:
        if "packed" in infos:
            return True
        if "codes" in infos and infos["codes"].dtype in _FLOATS and "scales" in infos:
            name = quoted(infos["codes"].name)
            raise self.error(f"{name} is {infos['codes'].dtype} with scales: the weights are not compressed")
        return "codes" in infos and infos["codes"].dtype in ("I8", "F8_E4M3")

    def form(self, infos: Infos, read: Read) -> Form:
        if "packed" not in infos:
            return self._plain(infos)
        if infos["packed"].dtype == "U8":
            return self._four_bit_floats(infos)
        n, words = self.matrix(infos["packed"], ("I32",))
        if "shape" not in infos:
            raise self.error(f"{quoted(infos['packed'].name)} has no `weight_shape`")
        self.expect(infos["shape"], ("I64", "I32"), (2,))
        rows, width = read("shape", None).tolist()
        scales = infos["scales"]
        self.expect(scales, _FLOATS)
        for each in self._weights:
            bits, size = each.get("num_bits"), each.get("group_size")
            if bits not in (4, 8) or rows != n or -(-width * bits // 32) != words:
                continue
            size = size if _is_count(size) and each.get("strategy", "group") == "group" else width
            groups = -(-width // size)
            if scales.shape == (n, groups):
                if "zeros" in infos:
                    self.expect(infos["zeros"], ("I32",), (-(-n * bits // 32), groups))
                if "columns" in infos:
                    self.expect(infos["columns"], ("I32", "I64"), (width,))
                return Form((n, width), Integers(self.label, bits, width, size, 1 << (bits - 1)))
        known = " or ".join(sorted({str(each.get("num_bits")) for each in self._weights}))
        raise self.error(
            f"{quoted(infos['packed'].name)} {[n, words]} of weight_shape {[rows, width]}, with scales "
            f"{list(scales.shape)}, does not agree with {known} bits and the group size (4 and 8 bits are "
            "supported)"
        )

    def _plain(self, infos: Infos) -> Form:
        n, k = self.matrix(infos["codes"], ("I8", "F8_E4M3"))
        scales = infos["scales"]
        self.expect(scales, _FLOATS)
        rows, size = (1, k) if scales.shape in ((), (1,), (n, 1), (1, 1)) else self._block(scales, n, k)
        if infos["codes"].dtype == "F8_E4M3":
            return Form((n, k), Floats(self.label, 8, k, size), rows)
        if "zeros" in infos:
            self.expect(infos["zeros"], ("I8",), scales.shape)
        return Form((n, k), Integers(self.label, 8, k, size), rows)

    def _block(self, scales: TensorInfo, n: int, k: int) -> tuple[int, int]:
        """The rows and columns of a block with these scales."""
        for each in self._weights:
            block = each.get("block_structure")
            rows, columns = (
                block if isinstance(block, list) and len(block) == 2 else (1, each.get("group_size"))
            )
            if _is_count(rows) and _is_count(columns) and scales.shape == (-(-n // rows), -(-k // columns)):
                return rows, columns
        raise self.error(f"{quoted(scales.name)} is {list(scales.shape)}, which are no scales of {[n, k]}")

    def _four_bit_floats(self, infos: Infos) -> Form:
        n, half = self.matrix(infos["packed"], ("U8",))
        size = 16 if "divisor" in infos else 32
        types = ("F8_E4M3",) if "divisor" in infos else ("U8",)
        self.expect(infos["scales"], types, (n, -(-2 * half // size)))
        if "divisor" in infos:
            self.expect(infos["divisor"], _FLOATS, (1,), ())
        return Form((n, 2 * half), Floats(self.label, 4, 2 * half, size))

    def parts(self, form: Form, read: Read, rows: slice) -> dict[str, Array]:
        n, k = form.shape
        packed = read("packed", rows)
        scales = read("scales", None)
        if isinstance(form.encoding, Floats):
            if form.encoding.bits == 4:
                parts = {"codes": packed, "scales": scales[rows]}
                divisor = read("divisor", None)
                if divisor.size:
                    factor = np.float32(1) / divisor.astype(np.float32).reshape(1, 1)
                    parts["factor"] = np.broadcast_to(factor, (len(packed), 1))
                return parts
            return {"codes": read("codes", rows).view(np.uint8), "scales": _of_rows(scales, form, rows)}
        assert isinstance(form.encoding, Integers)
        bits = form.encoding.bits
        if not packed.size:
            parts = {"codes": read("codes", rows), "scales": _of_rows(scales, form, rows)}
            zeros = read("zeros", None)
            return {**parts, "zeros": _of_rows(zeros, form, rows).astype(np.int16)} if zeros.size else parts
        codes = np.ascontiguousarray(packed).view(np.uint8)
        parts = {"codes": codes[:, : -(-k * bits // 8)], "scales": scales[rows]}
        zeros = read("zeros", None)
        if zeros.size:
            words = np.ascontiguousarray(zeros.T).view(np.uint8)
            parts["zeros"] = unpacked(words, bits, n)[:, rows].T.astype(_zero_type(bits))
        columns = read("columns", None)
        unset = columns.size > 0 and bool((columns == -1).all())
        return parts | ({} if unset else self.columns(form, columns, scales.shape[1]))


class Mlx(Method):
    """MLX: codes in words of 32 bits without gaps, times scales, plus biases (affine); or small floats.

    weight: U32 (n, k * bits / 32). scales, biases: (n, k / size). Modes mxfp4 and mxfp8: scales U8, which are
    exponents; nvfp4: scales U8, which are float8.
    """

    label: ClassVar[str] = "MLX"
    suffixes: ClassVar[Mapping[str, str]] = {"codes": "weight", "scales": "scales", "biases": "biases"}
    optional: ClassVar[tuple[str, ...]] = ("biases",)

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        super().__init__(settings, where)
        own = {key: value for key, value in settings.items() if isinstance(value, dict)}
        self._choices = [self._choice(each) for each in (settings, *own.values())]

    def _choice(self, settings: Mapping[str, Any]) -> tuple[int, int, str]:
        bits, size, mode = settings.get("bits"), settings.get("group_size"), settings.get("mode", "affine")
        if not _is_count(bits) or bits not in (2, 3, 4, 5, 6, 8) or not _is_count(size):
            raise self.error(
                f"quantization has bits {bits!r:.20} and group_size {size!r:.20}: expected 2 to 8, and a size"
            )
        if mode not in ("affine", "mxfp4", "nvfp4", "mxfp8"):
            raise self.error(f"quantization mode {mode!r:.20} is not supported")
        return bits, size, mode

    def is_quantized(self, infos: Infos) -> bool:
        return infos["codes"].dtype == "U32"

    def form(self, infos: Infos, read: Read) -> Form:
        n, words = self.matrix(infos["codes"], ("U32",))
        scales = infos["scales"]
        for bits, size, mode in self._choices:
            width = words * 32 // bits
            affine = "biases" in infos
            if width * bits != words * 32 or width % size or scales.shape != (n, width // size):
                continue
            if affine != (mode == "affine"):
                continue
            if affine:
                self.expect(scales, _FLOATS)
                self.expect(infos["biases"], _FLOATS, scales.shape)
                return Form((n, width), Integers(self.label, bits, width, size))
            self.expect(scales, ("U8",))
            return Form((n, width), Floats(f"{self.label} {mode}", bits, width, size))
        raise self.error(
            f"{quoted(infos['codes'].name)} is {[n, words]} with scales {list(scales.shape)}, which no bits "
            "and group_size of `quantization` explain"
        )

    def parts(self, form: Form, read: Read, rows: slice) -> dict[str, Array]:
        parts = {
            "codes": np.ascontiguousarray(read("codes", rows)).view(np.uint8),
            "scales": read("scales", rows),
        }
        if isinstance(form.encoding, Integers):
            parts["biases"] = read("biases", rows)
        elif form.encoding.name.endswith("nvfp4"):
            import ml_dtypes

            parts["scales"] = parts["scales"].view(ml_dtypes.float8_e4m3fn)
        return parts


METHODS: dict[str, type[Method]] = {
    "fp8": Fp8,
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "mlx": Mlx,
}
"""`quant_method` of config.json -> method; "mlx" for the key `quantization`."""


def method_name(settings: Any) -> str:
    """Return the `quant_method` of settings of config.json, or the one that they belong to, or ""."""
    if not isinstance(settings, Mapping):
        return ""
    method = settings.get("quant_method")
    if isinstance(method, str):
        return method
    if "config_groups" in settings:
        return "compressed-tensors"
    if "group_size" in settings and "bits" in settings and "w_bit" not in settings:
        return "mlx"
    return "awq" if "w_bit" in settings else "fp8" if "weight_block_size" in settings else ""


def _of_rows(scales: Array, form: Form, rows: slice) -> Array:
    """Scales of the matrix, of its rows or of blocks of rows as those of `rows`, (rows, groups)."""
    if scales.size == 1:
        return np.broadcast_to(scales.reshape(1, 1), (rows.stop - rows.start, 1))
    return (
        scales[rows] if form.block_rows == 1 else scales[np.arange(rows.start, rows.stop) // form.block_rows]
    )


def _zero_type(bits: int) -> Any:
    """The type of zero points, which can exceed the largest code by 1."""
    return np.int8 if bits < 8 else np.int16


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
