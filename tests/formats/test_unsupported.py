"""Files and folders of other kinds are called by their names, with the way out."""

from __future__ import annotations

import gzip
import io
import lzma
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from einsum_transformer.errors import FormatError
from einsum_transformer.formats.folder import open_tensors
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.formats.safetensors import SafetensorsFile, write_safetensors

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99\n"


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=np.zeros(2))
    return buffer.getvalue()


KINDS = [
    (LFS, "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (gzip.compress(b"weights" * 99, mtime=0), "compressed with gzip: unpack it first"),
    (lzma.compress(b"weights" * 99), "compressed with xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd" + bytes(99), "compressed with zstd: unpack it first"),
    (torch_zip(), "unpickling runs code"),
    (npz(), "an archive of NumPy arrays"),
    (b"\x80\x04K\x01.", "unpickling runs code"),
    (b"tjgg" + bytes(99), "a GGML file from before GGUF"),
    (b"algg" + bytes(99), "a GGML file from before GGUF"),
    (b"<!DOCTYPE html><html>Log in</html>", "a web page"),
    (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    (b"PAR1" + bytes(99), "a Parquet file"),
    (b"", "empty"),
]


@pytest.mark.parametrize(("content", "words"), KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "model", "model.bin"])
def test_a_weight_file_of_another_kind_is_called_by_its_name(
    tmp_path: Path, content: bytes, words: str, name: str
) -> None:
    (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name] if name != "model.safetensors" else [tmp_path, tmp_path / name]
    for path in paths:
        with pytest.raises(FormatError) as caught:
            open_tensors(path)
        assert words in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_contents_decide_whatever_the_suffix_is(tmp_path: Path) -> None:
    for name in ("weights", "weights.gguf", "weights.bin"):
        write_safetensors(tmp_path / name, {"w": np.ones(2, np.float32)})
        assert isinstance(open_tensors(tmp_path / name), SafetensorsFile)
    for name in ("model", "sha256-0123", "model.safetensors", "ggml-model.bin"):
        writer = GGUFWriter(tmp_path / name, "llama")
        writer.add_tensor("w", np.ones((2, 2), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert isinstance(open_tensors(tmp_path / name), GGUFFile)


@pytest.mark.parametrize("name", ["m.gguf-split-b", "m.Q4_K_M.gguf.part2of3", "m.gguf.split-aa"])
def test_pieces_of_a_cut_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF" + bytes(99))
    with pytest.raises(FormatError, match="join all pieces"):
        open_tensors(tmp_path / name)


FOLDERS = {
    "pytorch_model.bin": "pytorch_model.bin: pickle checkpoints are refused",
    "pytorch_model-00001-of-00002.bin tf_model.h5": "pickle checkpoints are refused",
    "consolidated.safetensors params.json": "Mistral's own format",
    "consolidated.00.pth params.json": "Meta's original format",
    "weights.npz": "an old MLX model",
    "weights.00.npz": "an old MLX model",
    "tf_model.h5": "a TensorFlow model",
    "flax_model.msgpack": "a Flax model",
    "model.onnx": "an ONNX model",
    "rank0.engine": "a TensorRT-LLM model",
    "rank0.safetensors": "a TensorRT-LLM model",
    "openvino_model.xml": "an OpenVINO model",
    "model_index.json": "a diffusers pipeline",
    "modules.json": "a sentence-transformers model",
    "__0_0.distcp": "a sharded PyTorch (FSDP) checkpoint",
    "zero_to_fp32.py latest": "a DeepSpeed checkpoint",
    "latest_checkpointed_iteration.txt": "a Megatron-LM checkpoint",
    "model.bin shared_vocabulary.json": "a CTranslate2 model",
    "model-00001-of-00002.safetensors": "no model.safetensors.index.json",
    "pytorch.safetensors": "holds pytorch.safetensors, not model.safetensors: rename it",
    "adapter_model.safetensors": "an adapter, not a model: name the base model and give the adapter as",
    "adapters.safetensors 0000100_adapters.safetensors": "an adapter, not a model",
    "model.safetensors.gz": "model.safetensors.gz: a file compressed with gz: unpack it first",
    "config.json m.gguf.zst": "m.gguf.zst: a file compressed with zst",
    "a/config.json b/config.json c/notes": "name one of a, b",
    "snapshots/0123/config.json refs/main": "name one of snapshots/0123",
    "notes.txt": "neither model.safetensors nor",
    "": "the folder is empty",
}


@pytest.mark.parametrize("names", FOLDERS)
def test_a_folder_without_weights_is_called_by_what_it_holds(tmp_path: Path, names: str) -> None:
    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FormatError) as caught:
        open_tensors(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert FOLDERS[names] in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "m.gguf"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("gone")
    with pytest.raises(FormatError, match=rf"{name}: a link that leads nowhere"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors.index.json"])
def test_a_pointer_or_a_pickle_index_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(FormatError, match="run `git lfs pull`"):
        open_tensors(tmp_path)
    (tmp_path / name).write_text('{"weight_map": {"w": "pytorch_model-00001-of-00002.bin"}}')
    with pytest.raises(FormatError, match=r"index\.json: tensor 'w'.*a pickle"):
        open_tensors(tmp_path)
