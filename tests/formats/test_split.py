"""Split GGUF models: any part stands for all of them, and a part that does not fit is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from einsum_transformer.errors import FormatError
from einsum_transformer.formats.folder import open_tensors, single_gguf
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.formats.split import first_parts, part_names

TENSORS = {f"t{i}": np.full((2, 4), i, np.float32) for i in range(6)}


def write_parts(folder: Path, small_first: bool = False, name: str = "m") -> list[Path]:
    """The tensors in three files (four with an empty first one), as the gguf package splits them."""
    folder.mkdir(exist_ok=True)
    writer = GGUFWriter(folder / f"{name}.gguf", "llama", split_max_tensors=2, small_first_shard=small_first)
    for key, tensor in TENSORS.items():
        writer.add_tensor(key, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{name}-*.gguf"))


def write_part(path: Path, number: int, count: int, names: list[str], **keys: Any) -> None:
    writer = GGUFWriter(path, keys.pop("arch", "llama"))
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", count)
    writer.add_int32("split.tensors.count", keys.pop("total", len(TENSORS)))
    for name in names:
        writer.add_tensor(name, TENSORS[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refusal(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        open_tensors(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("small_first", [False, True])
def test_any_part_opens_the_whole_model(tmp_path: Path, small_first: bool) -> None:
    parts = write_parts(tmp_path, small_first)
    assert len(parts) == 3 + small_first
    assert (GGUFFile(parts[0]).names() == []) == small_first
    for part in parts:
        source = open_tensors(part)
        assert isinstance(source, GGUFFile)
        assert sorted(source.names()) == sorted(TENSORS)
        assert (source.path, source.metadata["general.architecture"]) == (parts[0], "llama")
        for name, tensor in TENSORS.items():
            np.testing.assert_array_equal(source.read(name), tensor)
            np.testing.assert_array_equal(source.read_rows(name, 1, 2), tensor[1:])
            assert source.info(name).file in parts
            source.release(name)
        with pytest.raises(FormatError, match="there is no tensor 'other'"):
            source.read("other")
        source.close()


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_part_that_is_missing_is_named(tmp_path: Path, gone: int) -> None:
    parts = write_parts(tmp_path)
    parts[gone].unlink()
    assert refusal(parts[gone - 1]).startswith(f"{parts[gone]}: this part is missing")


def test_a_part_of_another_place_model_or_count_is_named(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    shutil.copy(parts[1], parts[2])
    assert refusal(parts[0]).startswith(f"{parts[2]}: split.no is 1, expected 2")
    write_part(parts[2], 2, 4, ["t4", "t5"])
    assert refusal(parts[0]).startswith(f"{parts[2]}: split.count is 4, expected 3")
    write_part(parts[2], 2, 3, ["t4", "t5"], arch="qwen2")
    assert "a part of another model" in refusal(parts[0])
    write_part(parts[2], 2, 3, ["t4", "t0"])
    assert refusal(parts[0]).startswith(f"{parts[2]}: tensor 't0' is also in {parts[0].name}")
    write_part(parts[2], 2, 3, ["t4"])
    assert "split.tensors.count is 6, but the 3 parts contain 5 tensors" in refusal(parts[0])
    (tmp_path / "whole").mkdir()
    other = tmp_path / "whole" / "x-00003-of-00003.gguf"
    write_part(other, 0, 1, ["t0"], total=1)
    assert open_tensors(other).names() == ["t0"]  # its metadata says that it is whole
    shutil.copy(other, parts[2])
    assert refusal(parts[0]).startswith(f"{parts[2]}: split.no is 0, expected 2")


@pytest.mark.parametrize(
    ("name", "number", "count", "message"),
    [
        ("renamed.gguf", 0, 3, "its name must end as in NAME-00001-of-00003.gguf"),
        ("m-00002-of-00003.gguf", 0, 3, "part 1 of 3"),
        ("m-00001-of-00002.gguf", 0, 3, "part 1 of 3"),
        ("m-00001-of-00003.gguf", 3, 3, "no such part"),
    ],
)
def test_a_name_must_agree_with_the_metadata(
    tmp_path: Path, name: str, number: int, count: int, message: str
) -> None:
    write_part(tmp_path / name, number, count, ["t0"])
    assert message in refusal(tmp_path / name)


def test_links_to_parts_outside_the_folder_need_permission(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "store")
    (tmp_path / "here").mkdir()
    for part in parts:
        (tmp_path / "here" / part.name).symlink_to(part)
    link = tmp_path / "here" / parts[0].name
    assert "`allow_links`" in refusal(link)
    assert len(open_tensors(link, allow_links=True).names()) == len(TENSORS)
    with pytest.raises(FormatError, match="`allow_links`"):
        single_gguf(tmp_path / "here")
    assert single_gguf(tmp_path / "here", allow_links=True) == link


class TestFolders:
    def test_one_model_in_several_parts(self, tmp_path: Path) -> None:
        parts = write_parts(tmp_path)
        assert single_gguf(tmp_path) == parts[0]
        parts[0].unlink()
        assert single_gguf(tmp_path) == parts[1]  # which names what is missing

    def test_several_models_are_listed(self, tmp_path: Path) -> None:
        write_parts(tmp_path)
        write_parts(tmp_path, name="other")
        with pytest.raises(FormatError, match=r"several GGUF models: choose one of m-00001.*, other-00001"):
            single_gguf(tmp_path)

    def test_files_that_are_no_models_are_left_out(self, tmp_path: Path) -> None:
        parts = write_parts(tmp_path)
        for name, arch, kind in [("mmproj.gguf", "clip", "model"), ("lora.gguf", "llama", "adapter")]:
            writer = GGUFWriter(tmp_path / name, arch)
            writer.add_type(kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
        assert single_gguf(tmp_path) == parts[0]

    def test_a_file_without_suffix_is_found_by_its_contents(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("hello")
        write_part(tmp_path / "blob", 0, 1, ["t0"], total=1)
        assert single_gguf(tmp_path) == tmp_path / "blob"

    @pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
    def test_safetensors_come_first(self, tmp_path: Path, name: str) -> None:
        write_parts(tmp_path)
        (tmp_path / name).write_text("")
        assert single_gguf(tmp_path) is None


def test_names_of_parts() -> None:
    names = part_names("a-b-00002-of-00003.gguf")
    assert names == [f"a-b-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert part_names("a.gguf") == ["a.gguf"]
    assert first_parts(map(Path, [*names[1:], "a.gguf"])) == [Path(names[1]), Path("a.gguf")]
