"""Checkpoint folders: layouts, mismatches of index and shards, and paths that try to leave the folder."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from einsum_transformer.errors import FormatError, InputError
from einsum_transformer.formats.folder import SafetensorsFolder, open_tensors, write_safetensors_folder
from einsum_transformer.formats.safetensors import SafetensorsFile, write_safetensors
from hostile import INDEXES

_opened: list[Path] | None = None


def _record(event: str, args: tuple) -> None:
    if event == "open" and _opened is not None and isinstance(args[0], str):
        _opened.append(Path(args[0]).resolve())


sys.addaudithook(_record)


@pytest.fixture
def opened() -> Iterator[list[Path]]:
    """The files that the interpreter opens during the test, links resolved."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


def four_tensors() -> dict[str, np.ndarray]:
    return {f"layers.{i}.w": np.full((2, 4), i, np.float32) for i in range(4)}  # of 32 bytes each


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def contents(folder: Path) -> dict[str, np.ndarray]:
    source = SafetensorsFolder(folder)
    return {name: source.read(name) for name in source.names()}


@pytest.mark.parametrize(
    ("limit", "names"),
    [
        (1000, ["model.safetensors"]),
        (64, [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)] + ["model.safetensors.index.json"]),
        (1, [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)] + ["model.safetensors.index.json"]),
    ],
)
def test_each_layout_survives_a_round_trip(tmp_path, limit, names):
    tensors = four_tensors()
    write_safetensors_folder(tmp_path / "new" / "folder", tensors, limit)
    assert files(tmp_path / "new" / "folder") == names
    source = open_tensors(tmp_path / "new" / "folder")
    assert source.names() == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor, strict=True)
        assert source.info(name).shape == (2, 4)
        source.release(name)
    source.close()


def test_index_is_what_other_readers_expect(tmp_path):
    write_safetensors_folder(tmp_path, four_tensors(), 64)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 128},
        "weight_map": {f"layers.{i}.w": f"model-0000{1 + i // 2}-of-00002.safetensors" for i in range(4)},
    }
    assert SafetensorsFile(tmp_path / "model-00002-of-00002.safetensors").metadata == {"format": "pt"}


def test_saving_in_another_layout_removes_the_old_one_and_nothing_else(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-extra.safetensors").write_text("not ours")
    kept = ["config.json", "model-extra.safetensors"]
    for limit in (1000, 64, 1, 64, 1000):
        tensors = {name: tensor + limit for name, tensor in four_tensors().items()}
        write_safetensors_folder(tmp_path, tensors, limit)
        for name, tensor in contents(tmp_path).items():
            np.testing.assert_array_equal(tensor, tensors[name])
        shards = {1000: 0, 64: 2, 1: 4}[limit]
        assert len(files(tmp_path)) == len(kept) + 1 + shards
    assert files(tmp_path) == sorted([*kept, "model.safetensors"])


class Failing(dict[str, np.ndarray]):
    """Gives every tensor once, for its shape, and fails at the third one that is to be written."""

    accesses = 0

    def __getitem__(self, name: str) -> np.ndarray:
        self.accesses += 1
        if self.accesses > len(self) + 2:
            raise RuntimeError("gone")
        return super().__getitem__(name)


@pytest.mark.parametrize("old_limit", [64, 1000])
def test_a_failed_save_leaves_the_old_one_whole(tmp_path, old_limit):
    write_safetensors_folder(tmp_path, four_tensors(), old_limit)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="gone"):
        write_safetensors_folder(tmp_path, Failing({n: t + 9 for n, t in four_tensors().items()}), 64)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_index_takes_its_place_last_and_old_files_go_after_that(tmp_path, monkeypatch):
    write_safetensors_folder(tmp_path, four_tensors(), 1)
    replace, seen = os.replace, []

    def recording(source: Path, target: Path) -> None:
        seen.append(target.name)
        assert "model-00004-of-00004.safetensors" in files(tmp_path)
        replace(source, target)

    monkeypatch.setattr("os.replace", recording)
    write_safetensors_folder(tmp_path, four_tensors(), 64)
    assert len(seen) == 3
    assert seen[-1] == "model.safetensors.index.json"
    assert "model-00004-of-00004.safetensors" not in files(tmp_path)


def test_shards_are_opened_when_first_needed(tmp_path, opened):
    write_safetensors_folder(tmp_path, four_tensors(), 64)
    opened.clear()
    source = SafetensorsFolder(tmp_path)
    assert opened == [tmp_path / "model.safetensors.index.json"]
    source.read("layers.3.w")
    source.read("layers.2.w")
    assert opened[1:] == [tmp_path / "model-00002-of-00002.safetensors"]


def test_unknown_tensor_names_the_folder_and_the_nearest_name(tmp_path):
    write_safetensors_folder(tmp_path, four_tensors(), 64)
    with pytest.raises(FormatError, match=rf"{tmp_path}: there is no tensor 'layers\.2\.v'.*'layers\.2\.w'"):
        SafetensorsFolder(tmp_path).read("layers.2.v")


def test_missing_shard_is_named(tmp_path):
    write_safetensors_folder(tmp_path, four_tensors(), 64)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model-00002-of-00002\.safetensors.*missing.*index\.json"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (
            ["layers.0.w"],
            r"index\.json lists tensor 'layers\.1\.w' .* but .*00001-of-00002\.safetensors does not contain",
        ),
        (["layers.0.w", "renamed"], r"'layers\.1\.w'"),
    ],
)
def test_shard_and_index_must_agree(tmp_path, held, message):
    write_safetensors_folder(tmp_path, four_tensors(), 64)
    write_safetensors(tmp_path / "model-00001-of-00002.safetensors", dict.fromkeys(held, np.zeros(2)))
    source = SafetensorsFolder(tmp_path)
    source.read("layers.3.w")
    with pytest.raises(FormatError, match=message):
        source.read("layers.0.w")


def test_tensors_that_the_index_omits_are_left_aside_with_a_note(tmp_path, caplog):
    """Also a second copy of a tensor that the index places in another shard."""
    write_safetensors_folder(tmp_path, four_tensors(), 64)
    held = {name: four_tensors()[name] for name in ("layers.0.w", "layers.1.w")}
    extra = {"z": np.zeros(2), "layers.3.w": np.full((2, 4), 9, np.float32)}
    write_safetensors(tmp_path / "model-00001-of-00002.safetensors", held | extra)
    for name, tensor in four_tensors().items():
        np.testing.assert_array_equal(contents(tmp_path)[name], tensor)
    assert "00001-of-00002.safetensors: 2 tensors, such as 'layers.3.w'" in caplog.text


def test_a_shard_that_cannot_be_used_is_read_once(tmp_path, opened):
    """However many tensors the index places in it."""
    write_safetensors(tmp_path / "a.safetensors", {"w": np.zeros(2)})
    write_index(tmp_path, {f"w{i}": "a.safetensors" for i in range(1000)})
    source = SafetensorsFolder(tmp_path)
    opened.clear()
    for name in source.names():
        with pytest.raises(FormatError, match=r"index\.json lists tensor 'w0'"):
            source.info(name)
    assert len(opened) == 1


LEAVING = [
    "../x.safetensors",
    "/abs/x.safetensors",
    "a/../../b.safetensors",
    "sub/x.safetensors",
    "..\\x.safetensors",
]
LEAVING += ["C:x.safetensors", "", ".", "..", "x\0.safetensors", "x\n.safetensors", "pytorch_model.bin"]


@pytest.mark.parametrize("value", [*LEAVING, None, 3, ["x.safetensors"]])
def test_weight_map_values_must_be_plain_names(tmp_path, opened, value):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "x.safetensors", tmp_path / "b.safetensors", folder / "sub" / "x.safetensors"):
        write_safetensors(place, {"w": np.zeros(2)})
    write_index(folder, {"w": value})
    opened.clear()
    with pytest.raises(FormatError, match=r"index\.json: tensor 'w'"):
        SafetensorsFolder(folder)
    assert opened == [folder / "model.safetensors.index.json"]


@pytest.mark.parametrize("name", ["model.safetensors", "shard.safetensors", "model.safetensors.index.json"])
def test_links_out_of_the_folder_are_not_followed(tmp_path, opened, name):
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(tmp_path / "secret", {"w": np.zeros(2)})
    if name == "shard.safetensors":
        write_index(folder, {"w": name})
    (folder / name).symlink_to("../secret")
    opened.clear()
    with pytest.raises(FormatError, match="link out of the folder"):
        SafetensorsFolder(folder)
    assert tmp_path / "secret" not in opened


@pytest.mark.parametrize("name", ["model.safetensors", "shard.safetensors", "model.safetensors.index.json"])
def test_links_out_of_the_folder_are_followed_if_allowed(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    write_index(folder, {"w": "shard.safetensors"})
    write_safetensors(folder / "shard.safetensors", {"w": np.ones(2)})
    if name == "model.safetensors":
        (folder / "shard.safetensors").rename(folder / name)
    (folder / name).rename(tmp_path / "stored")
    (folder / name).symlink_to("../stored")
    with pytest.raises(FormatError, match="`allow_links`"):
        SafetensorsFolder(folder)
    assert open_tensors(folder, allow_links=True).read("w").sum() == 2


def test_links_inside_the_folder_are_followed(tmp_path):
    write_safetensors(tmp_path / "real.safetensors", {"w": np.ones(2)})
    write_index(tmp_path, {"w": "link.safetensors"})
    (tmp_path / "link.safetensors").symlink_to("real.safetensors")
    assert SafetensorsFolder(tmp_path).read("w").sum() == 2


def test_links_in_a_circle_are_refused(tmp_path):
    write_index(tmp_path, {"w": "a.safetensors"})
    (tmp_path / "a.safetensors").symlink_to("a.safetensors")
    with pytest.raises(FormatError, match=r"a\.safetensors"):
        SafetensorsFolder(tmp_path)


def hub_snapshot(cache: Path) -> tuple[Path, Path]:
    snapshot = cache / "models--o--n" / "snapshots" / "0123abcd"
    blobs = cache / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    return snapshot, blobs


def test_hub_cache_links_to_its_blobs_are_followed(tmp_path):
    snapshot, blobs = hub_snapshot(tmp_path)
    write_safetensors(blobs / "f00d", {"w": np.ones(2)})
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    assert SafetensorsFolder(snapshot).read("w").sum() == 2


def test_hub_cache_links_to_blobs_that_repositories_share_are_followed(tmp_path):
    snapshot, blobs = hub_snapshot(tmp_path)
    (tmp_path / "blobs" / "fe").mkdir(parents=True)
    write_safetensors(tmp_path / "blobs" / "fe" / "feed", {"w": np.ones(2)})
    (blobs / "f00d").symlink_to("../../blobs/fe/feed")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    assert SafetensorsFolder(snapshot).read("w").sum() == 2


@pytest.mark.parametrize(
    "target", ["../../../models--other/blobs/f00d", "../../refs/f00d", "../../../secret"]
)
def test_hub_cache_links_elsewhere_are_refused(tmp_path, target):
    snapshot, _ = hub_snapshot(tmp_path)
    real = snapshot / target
    real.resolve().parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(real.resolve(), {"w": np.ones(2)})
    (snapshot / "model.safetensors").symlink_to(target)
    with pytest.raises(FormatError, match="link out of the folder"):
        SafetensorsFolder(snapshot)


@pytest.mark.parametrize(
    ("text", "message"),
    INDEXES,
)
def test_malformed_index_is_refused(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        SafetensorsFolder(tmp_path)


def test_index_over_the_limit_is_refused_unread(tmp_path, opened):
    with (tmp_path / "model.safetensors.index.json").open("wb") as file:
        file.truncate(100_000_001)  # sparse
    opened.clear()
    with pytest.raises(FormatError, match="larger than"):
        SafetensorsFolder(tmp_path)
    assert not opened


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.PKL"])
def test_pickle_checkpoints_are_refused_unopened(tmp_path, opened, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n")
    opened.clear()
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(FormatError, match=r"unpickling runs code.*convert it to safetensors"):
            open_tensors(path)
    assert tmp_path / name not in opened


def test_open_tensors_goes_by_what_the_path_is(tmp_path):
    write_safetensors_folder(tmp_path, four_tensors())
    assert isinstance(open_tensors(str(tmp_path)), SafetensorsFolder)
    assert isinstance(open_tensors(tmp_path / "model.safetensors"), SafetensorsFile)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="neither model"):
        open_tensors(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FormatError, match=r"notes\.txt: not a"):
        open_tensors(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="no such file or folder"):
        open_tensors(tmp_path / "absent")
    with pytest.raises(InputError, match="no such folder"):
        SafetensorsFolder(tmp_path / "absent")
