"""Files and folders of other kinds are called by their names, with the way out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from einsum_transformer.errors import FormatError
from einsum_transformer.formats.folder import open_tensors
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.formats.safetensors import SafetensorsFile, write_safetensors
from hostile import FOLDERS, KINDS, LFS


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
    with pytest.raises(FormatError, match=rf"{name}: a broken link"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors.index.json"])
def test_a_pointer_or_a_pickle_index_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(FormatError, match="run `git lfs pull`"):
        open_tensors(tmp_path)
    (tmp_path / name).write_text('{"weight_map": {"w": "pytorch_model-00001-of-00002.bin"}}')
    with pytest.raises(FormatError, match=r"index\.json: tensor 'w'.*a pickle"):
        open_tensors(tmp_path)
