"""Hub repositories: what is in the cache is checked by the index, and only what is needed is fetched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from einsum_transformer.errors import InputError
from einsum_transformer.loading import hub
from einsum_transformer.loading.sources import Options, resolve

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
SHARDED = ["config.json", "tokenizer.json", INDEX, *SHARDS]
SINGLE = ["config.json", "tokenizer.json", "model.safetensors"]
OTHERS = [
    *("merges.txt", "vocab.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
    *("consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "original/params.json"),
    *("original/consolidated.00.pth", "onnx/config.json", "pytorch_model.bin", "README.md", "m.gguf"),
]
GGUFS = ["m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m-f16.gguf", "config.json"]
SPLIT = [f"big-F16-0000{i}-of-00002.gguf" for i in (1, 2)]
Remote = Callable[..., list[Any]]


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """Makes a repository of these files, of which `cached` are in the cache; gives the list of downloads."""
    folder = tmp_path / "models--o--n" / "snapshots" / "0123"

    def put(name: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        index = json.dumps({"weight_map": {f"w{i}": shard for i, shard in enumerate(SHARDS)}})
        (folder / name).write_text(index if name == INDEX else "{}")

    def make(files: list[str], cached: list[str] | None = None, online: bool = True) -> list[Any]:
        fetched: list[Any] = []
        for name in cached or ():
            put(name)

        def snapshot_download(repo: str, **options: Any) -> str:
            assert repo == "o/n"
            if options.get("local_files_only"):
                if cached is None:
                    raise FileNotFoundError("not cached")
                return str(folder)
            if not online:
                raise OSError("no network\nat all")
            patterns = {key: options.get(key) for key in ("allow_patterns", "ignore_patterns")}
            wanted = list(filter_repo_objects(files, **patterns))
            assert wanted, "nothing is fetched, which huggingface_hub warns of"
            for name in wanted:
                if not (folder / name).exists():
                    fetched.append(name)
                put(name)
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

        def model_info(*_: Any, **__: Any) -> SimpleNamespace:
            if not online:
                raise RuntimeError("no network\nat all")  # the HTTP client's own, no OSError
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        return fetched

    return make


def refusal(name: str, offline: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        hub.download(name, None, offline)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("files", [SHARDED, SINGLE])
def test_what_is_wholly_in_the_cache_is_not_fetched(remote: Remote, files: list[str]) -> None:
    fetched = remote(files, cached=files)
    for offline in (False, True):
        assert (hub.download("o/n", None, offline) / "config.json").exists()
    assert fetched == []


@pytest.mark.parametrize("gone", [[SHARDS[1]], SHARDS, ["config.json"], [SHARDS[0], "config.json"]])
def test_what_is_missing_from_the_cache_is_named_or_fetched(remote: Remote, gone: list[str]) -> None:
    kept = [name for name in SHARDED if name not in gone]
    fetched = remote(SHARDED, cached=kept)
    message = refusal("o/n", offline=True)
    assert all(name in message for name in gone)
    hub.download("o/n")
    assert sorted(fetched) == sorted(gone)


def test_a_repository_that_lacks_a_shard_itself_is_refused(remote: Remote) -> None:
    remote(SHARDED[:-1])
    assert refusal("o/n") == f"o/n: the repository lacks {SHARDS[2]}"


def test_other_formats_are_not_fetched(remote: Remote) -> None:
    fetched = remote(SHARDED + OTHERS)
    hub.download("o/n")
    assert sorted(fetched) == sorted(SHARDED + OTHERS[:4])


def test_a_tokenizer_that_the_cache_lacks_is_asked_for(remote: Remote) -> None:
    """Other programs may have fetched the weights alone; without the network they are used as they are."""
    weights = [name for name in SINGLE if name != "tokenizer.json"]
    assert hub.download("o/n", None, bool(remote(SINGLE, cached=weights, online=False))).is_dir()
    fetched = remote(SINGLE, cached=weights)
    assert hub.download("o/n", None, offline=True).is_dir()
    assert fetched == []
    hub.download("o/n")
    assert fetched == ["tokenizer.json"]


def test_without_network_the_reason_is_one_line(remote: Remote) -> None:
    remote(SHARDED, cached=SHARDED[:-1], online=False)
    assert refusal("o/n") == "o/n: cannot be downloaded from the hub: no network"


class TestGGUF:
    def test_the_only_model_is_fetched(self, remote: Remote) -> None:
        fetched = remote(["m-Q4_K_M.gguf", "mmproj-m-f16.gguf", "README.md"])
        assert hub.download("o/n").name == "m-Q4_K_M.gguf"
        assert fetched == ["m-Q4_K_M.gguf"]

    def test_several_are_listed(self, remote: Remote) -> None:
        fetched = remote(GGUFS)
        message = refusal("o/n")
        assert (
            "several GGUF models: choose one as o/n:Q4_K_M or o/n:FILE, from m-Q4_K_M.gguf, m-Q8_0.gguf"
            in message
        )
        assert fetched == []

    @pytest.mark.parametrize("tag", ["Q8_0", "q8_0", "m-Q8_0.gguf"])
    def test_one_is_named_by_quantization_or_file(self, remote: Remote, tag: str) -> None:
        fetched = remote(GGUFS)
        assert hub.download(f"o/n:{tag}").name == "m-Q8_0.gguf"
        assert fetched == ["m-Q8_0.gguf"]
        remote(GGUFS, cached=["m-Q8_0.gguf"], online=False)
        assert resolve(f"o/n:{tag}", Options(offline=True)).name == "m-Q8_0.gguf"

    def test_one_that_is_not_there(self, remote: Remote) -> None:
        remote(GGUFS)
        assert "o/n:Q2_K: has no GGUF model 'Q2_K': choose one" in refusal("o/n:Q2_K")
        assert "missing: Q2_K" in refusal_of_cached(remote, "o/n:Q2_K")

    @pytest.mark.parametrize("tag", ["Q8_0", "m-Q8_0.gguf", "F16", SPLIT[1]])
    def test_another_than_the_cached_one_is_fetched(self, remote: Remote, tag: str) -> None:
        fetched = remote(GGUFS + SPLIT, cached=["m-Q4_K_M.gguf"])
        wanted = SPLIT if "F16" in tag else ["m-Q8_0.gguf"]
        assert f"o/n:{tag}: not in the cache (missing: {tag}; it has m-Q4_K_M.gguf)" in refusal(
            f"o/n:{tag}", offline=True
        )
        assert hub.download(f"o/n:{tag}").name == wanted[0]
        assert fetched == wanted

    def test_what_the_cache_holds_does_not_decide_which_is_meant(
        self, remote: Remote, caplog: pytest.LogCaptureFixture
    ) -> None:
        fetched = remote(GGUFS, cached=["m-Q4_K_M.gguf"])
        assert "several GGUF models" in refusal("o/n")
        assert "several GGUF models" in refusal("o/n:m")
        assert "has no GGUF model 'Q2_K'" in refusal("o/n:Q2_K")
        assert "m-Q8_0.gguf" in refusal("o/n:Q2_K")
        assert not caplog.records
        assert hub.download("o/n", None, offline=True).name == "m-Q4_K_M.gguf"
        assert "the only GGUF model in the cache" in caplog.text
        assert fetched == []
        fetched = remote([*GGUFS, *SINGLE], cached=[])
        assert hub.download("o/n").is_dir()
        assert sorted(fetched) == sorted(SINGLE)

    @pytest.mark.parametrize("tag", ["", ":Q4_K_M", ":m-Q4_K_M.gguf"])
    def test_without_network_the_cached_one_is_used(self, remote: Remote, tag: str) -> None:
        remote(GGUFS, cached=["m-Q4_K_M.gguf"], online=False)
        assert hub.download(f"o/n{tag}").name == "m-Q4_K_M.gguf"

    def test_a_part_that_the_repository_lacks_is_named(self, remote: Remote) -> None:
        assert remote(SPLIT[:1]) == []
        assert refusal("o/n") == f"o/n: the repository lacks {SPLIT[1]}"

    @pytest.mark.parametrize("name", ["o/n", "o/n:F16", f"o/n:{SPLIT[1]}"])
    def test_all_parts_of_a_split_one(self, remote: Remote, name: str) -> None:
        fetched = remote(SPLIT)
        assert hub.download(name).name == SPLIT[0]
        assert fetched == SPLIT
        (hub.download(name).parent / SPLIT[1]).unlink()
        remote(SPLIT, cached=[])
        assert SPLIT[1] in refusal(name, offline=True)

    def test_parts_in_a_folder(self, remote: Remote) -> None:
        fetched = remote([f"F16/{part}" for part in SPLIT] + ["Q4/m-Q4_0.gguf"])
        assert (
            hub.download("o/n:F16").relative_to(hub.download("o/n:F16").parents[1]).as_posix()
            == f"F16/{SPLIT[0]}"
        )
        assert fetched == [f"F16/{part}" for part in SPLIT]


def refusal_of_cached(remote: Remote, name: str) -> str:
    remote(GGUFS, cached=["config.json"])
    return refusal(name, offline=True)


def test_a_repository_of_pickles_is_refused(remote: Remote) -> None:
    remote(["config.json", "pytorch_model.bin"])
    assert "no safetensors weights and no GGUF model; it has pytorch_model.bin, a pickle" in refusal("o/n")


@pytest.mark.parametrize(
    ("files", "name", "words"),
    [
        (SINGLE[1:], "o/n", "o/n: the repository has model.safetensors, but no config.json"),
        (SHARDED[1:], "o/n", f"o/n: the repository has {INDEX}, but no config.json"),
        (SINGLE, "o/n:Q4", "safetensors weights and no GGUF models: load it as o/n"),
        (["config.json", "x.safetensors"], "o/n", "such as x.safetensors, but neither model.safetensors nor"),
        (
            ["config.json", SHARDS[0]],
            "o/n",
            f"such as {SHARDS[0]}, but neither model.safetensors nor {INDEX}",
        ),
        (["adapter_config.json", "adapter_model.bin"], "o/n", "it has adapter_model.bin, a pickle"),
    ],
)
def test_what_a_repository_has_instead_is_named(
    remote: Remote, files: list[str], name: str, words: str
) -> None:
    fetched = remote(files)
    assert words in refusal(name)
    assert fetched == []


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapters.safetensors"])
def test_an_adapter_can_be_pulled(remote: Remote, weights: str) -> None:
    fetched = remote(["adapter_config.json", weights])
    hub.download("o/n")
    assert len(fetched) == 2


@pytest.mark.parametrize("name", ["o", "o/n/x", "o/n:", "o/n:a/b", "o/../n", "o/n:../x"])
def test_what_is_no_repository(name: str) -> None:
    assert "owner/name" in refusal(name)
