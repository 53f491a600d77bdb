"""load(): what is in the files is what computes, or the file, the tensor and the reason are named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.numpy import load_file

import einsum_transformer as et
from einsum_transformer.formats.folder import write_safetensors_folder
from einsum_transformer.loading.configs import read_config
from einsum_transformer.loading.contents import look
from einsum_transformer.loading.sources import Options, find
from einsum_transformer.models.families import FAMILIES
from gguf_files import write_model_gguf
from golden_files import MODELS, load_golden, write_folder
from tiny_models import hf_config, random_weights, reference_logits, write_config, write_tiny

pytestmark = pytest.mark.usefixtures("every_load_is_inspected")
Array = np.ndarray
IDS = np.random.default_rng(9).integers(0, 61, (2, 17))
Q = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Wide enough that the loader lays matrices out input-major.
WIDE = {"vocab_size": 600, "intermediate_size": 560, "head_dim": 64}


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(et.InputError) as caught:
        et.load(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 2000
    return message


_opened: list[str] = []


@cache
def _watch() -> None:
    # An audit hook sees every way to open a file, and can never be taken away again.
    sys.addaudithook(lambda event, args: _opened.append(str(args[0])) if event == "open" else None)


def files_opened() -> list[str]:
    """The paths of the files that are opened from now on."""
    _watch()
    _opened.clear()
    return _opened


def shards(folder: Path, weights: dict[str, Array], config: dict[str, Any]) -> dict[str, str]:
    """A folder of many small shards; returns the index's weight_map."""
    folder.mkdir(exist_ok=True)
    write_config(folder / "config.json", config)
    write_safetensors_folder(folder, weights, max_shard_bytes=4000)
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("changes", [{}, WIDE, WIDE | {"tie_word_embeddings": True, "attention_bias": True}])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equals_the_reference(changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    folder, weights = write_tiny(tmp_path, **changes)
    model = et.load(folder, dtype=dtype)
    expected = np.array([reference_logits(hf_config(**changes), weights, list(row)) for row in IDS])
    got = model.logits(IDS)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10 if dtype == "float64" else 3e-5)
    one = model.logits(IDS[:1, :1])  # a matrix-vector product takes another way
    np.testing.assert_allclose(one, expected[:1, :1], rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("budget", [None, 0])
def test_types_of_files(kind: Any, budget: int | None, tmp_path: Path) -> None:
    """Each number of the file, exactly, in the type that is computed in."""
    weights = {name: array.astype(kind) for name, array in random_weights(hf_config(**WIDE)).items()}
    folder = write_folder(tmp_path, hf_config(**WIDE), weights)
    for dtype in ("float32", "float64"):
        parameters = et.load(folder, dtype=dtype, weight_budget=budget).named_parameters()
        assert parameters.keys() == weights.keys()
        for name, array in weights.items():
            assert parameters[name].dtype == dtype
            np.testing.assert_array_equal(
                parameters[name], array.astype(np.float64).astype(dtype), err_msg=name
            )


def test_bfloat16_without_ml_dtypes_imported_by_the_caller(tmp_path: Path) -> None:
    """And a saved folder has the type that was computed in, in the file and in config.json."""
    weights = {name: array.astype(ml_dtypes.bfloat16) for name, array in random_weights(hf_config()).items()}
    folder = write_folder(tmp_path / "in", hf_config(dtype="bfloat16"), weights)
    program = "import sys, einsum_transformer as et; et.load(sys.argv[1]).save(sys.argv[2])"
    subprocess.run([sys.executable, "-c", program, folder, tmp_path / "out"], check=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32"
    for name, array in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(array, weights[name].astype(np.float32))


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint8, np.bool_])
def test_integers_are_no_weights(kind: Any, tmp_path: Path) -> None:
    """Packed or quantized numbers mean nothing without their scales."""
    folder, weights = write_tiny(tmp_path)
    write_folder(folder, hf_config(), weights | {Q: np.ones_like(weights[Q]).astype(kind)})
    assert Q in refusal(folder)


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_or_not_with_or_without_a_head(tied: bool, present: bool, tmp_path: Path) -> None:
    """Only an untied model without a head is an error; all others survive saving to the bit."""
    config = hf_config(tie_word_embeddings=tied)
    weights = random_weights(hf_config(tie_word_embeddings=True))
    if present:
        weights[HEAD] = weights[EMBEDDING] if tied else random_weights(hf_config())[HEAD]
    folder = write_folder(tmp_path / "in", config, weights)
    if not tied and not present:
        assert HEAD in refusal(folder)
        return
    model = et.load(folder)
    assert (HEAD in model.named_parameters()) == (not tied)
    model.save(tmp_path / "out")
    np.testing.assert_array_equal(et.load(tmp_path / "out").logits(IDS), model.logits(IDS))


def test_a_trained_tied_model_is_tied(tmp_path: Path) -> None:
    """The embedding is one array: what changes it changes the head, and the saved file has the new
    numbers."""
    path = write_config(tmp_path / "config.json", hf_config(tie_word_embeddings=True))
    model = et.load(path)
    model.named_parameters()[EMBEDDING][5] += 1.0
    assert model.decoder.head.weight is model.decoder.embed_tokens.weight
    model.save(tmp_path / "out")
    np.testing.assert_array_equal(et.load(tmp_path / "out").logits(IDS), model.logits(IDS))


@pytest.mark.parametrize(
    "head",
    [
        np.float32(3.0),
        np.zeros((61, 32), np.float32),
        np.zeros((32, 61), np.float32),
        np.zeros(0, np.float32),
    ],
)
def test_a_tied_model_with_another_head_is_refused(head: Any, tmp_path: Path) -> None:
    """Also of another shape, and of none."""
    config = hf_config(tie_word_embeddings=True)
    folder = write_folder(tmp_path, config, random_weights(config) | {HEAD: np.asarray(head)})
    assert HEAD in refusal(folder)


def test_every_shard_and_every_key_is_needed(tmp_path: Path) -> None:
    """Delete a shard, rename a key, in turn: each time the one that is missing is named."""
    weights, config = random_weights(hf_config()), hf_config()
    places = shards(tmp_path / "whole", weights, config)
    assert len(set(places.values())) > 5
    np.testing.assert_array_equal(
        et.load(tmp_path / "whole").logits(IDS),
        et.load(write_folder(tmp_path / "one", config, weights)).logits(IDS),
    )
    for name in [EMBEDDING, Q, "model.norm.weight", "model.layers.1.mlp.down_proj.weight"]:
        folder = tmp_path / name
        shards(folder, weights, config)
        (folder / places[name]).unlink()
        assert places[name] in refusal(folder)
        renamed = {key + ("x" if key == name else ""): array for key, array in weights.items()}
        shards(folder, renamed, config)
        message = refusal(folder)
        assert name in message
        assert f"{name}x" in message


@pytest.mark.parametrize(
    "target", ["../x.safetensors", "/tmp/x.safetensors", "a/../../x.safetensors", "..", "", "x\0.safetensors"]
)
def test_paths_that_leave_the_folder(target: str, tmp_path: Path) -> None:
    """Refused, and nothing outside is opened."""
    weights = random_weights(hf_config())
    folder = tmp_path / "model"
    places = shards(folder, weights, hf_config())
    write_folder(tmp_path, {}, {Q: weights[Q]})
    (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places | {Q: target}}))
    opened = files_opened()
    message = refusal(folder)
    assert "model.safetensors.index.json" in message
    assert not [path for path in opened if path.endswith("x.safetensors")]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_links_that_leave_the_folder(file: str, tmp_path: Path) -> None:
    """Weights behind a link out of the folder are refused; a config is read as text either way."""
    folder, _ = write_tiny(tmp_path / "model")
    (folder / file).rename(tmp_path / file)
    (folder / file).symlink_to(tmp_path / file)
    if file == "model.safetensors":
        assert "link" in refusal(folder)


@pytest.mark.parametrize("head_dim", [2, 4, 6, 32])
@pytest.mark.parametrize("given", [True, False])
def test_head_dim(head_dim: int, given: bool, tmp_path: Path) -> None:
    """Explicit, whatever hidden_size / heads is; derived from it where it is absent."""
    config = hf_config(head_dim=head_dim)
    weights = random_weights(config)
    folder = write_folder(tmp_path, {k: v for k, v in config.items() if given or k != "head_dim"}, weights)
    if not given and head_dim != 4:
        assert "q_proj" in refusal(folder)
        return
    expected = reference_logits(config, weights, list(IDS[0]))
    np.testing.assert_allclose(et.load(folder).logits(IDS)[0], expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    "name", ["a\nb", "a\x1b[31mb", "x" * 100_000, "\u202e", "model.layers.0.self_attn.q_proj.weight\n"]
)
def test_odd_tensor_names_are_told_in_one_short_line(name: str, tmp_path: Path) -> None:
    folder, weights = write_tiny(tmp_path)
    write_folder(folder, hf_config(), weights | {name: np.zeros(1, np.float32)})
    message = refusal(folder)
    assert message.isprintable()


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "x", "lm_head.bias"]
)
def test_a_tensor_without_a_place_is_refused(name: str, tmp_path: Path) -> None:
    """It would mean that the model is another one than the config says."""
    folder, weights = write_tiny(tmp_path)
    write_folder(folder, hf_config(), weights | {name: np.zeros(1, np.float32)})
    assert name in refusal(folder)


def test_many_wrong_tensors_are_told_shortly(tmp_path: Path) -> None:
    many = {f"model.layers.{i}.mlp.down_proj.weight": np.zeros(1, np.float32) for i in range(5000)}
    assert "and 4" in refusal(write_folder(tmp_path, hf_config(num_hidden_layers=4), many))


class TestMaxLayers:
    def test_the_first_layers(self, tmp_path: Path) -> None:
        folder, weights = write_tiny(tmp_path / "in", num_hidden_layers=3)
        model = et.load(folder, max_layers=2)
        assert model.config.num_hidden_layers == len(model.decoder.layers) == 2
        expected = reference_logits(hf_config(num_hidden_layers=2), weights, list(IDS[0]))
        np.testing.assert_allclose(model.logits(IDS)[0], expected, rtol=0, atol=3e-5)
        model.save(tmp_path / "out")
        np.testing.assert_array_equal(et.load(tmp_path / "out").logits(IDS), model.logits(IDS))

    def test_more_than_there_are(self, tmp_path: Path) -> None:
        folder, _ = write_tiny(tmp_path)
        assert et.load(folder, max_layers=99).config == et.load(folder).config

    @pytest.mark.parametrize("count", [0, -1])
    def test_none(self, count: int, tmp_path: Path) -> None:
        assert "max_layers" in refusal(write_tiny(tmp_path)[0], max_layers=count)

    def test_what_is_left_out_is_still_checked(self, tmp_path: Path) -> None:
        folder, weights = write_tiny(tmp_path)
        last = "model.layers.1.mlp.up_proj.weight"
        write_folder(folder, hf_config(), {name: array for name, array in weights.items() if name != last})
        assert last in refusal(folder, max_layers=1)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "int8"}, "int8"),
        ({"seed": -1}, "seed"),
        ({"weight_budget": -1}, "weight_budget"),
        ({"quantization": "W4A5"}, "W4A5"),
    ],
)
def test_wrong_options(options: dict[str, Any], word: str, tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.json", hf_config())
    assert word in refusal(path, **options)


@pytest.mark.parametrize(
    "source",
    [
        "nowhere.json",
        "nowhere.gguf",
        "/nowhere",
        "./nowhere",
        "~nobody-of-this-name/x",
        "x\0y",
        "a" * 5000,
        "a b",
        "/",
    ],
)
def test_sources_that_are_not_there(source: str) -> None:
    with pytest.raises(et.InputError) as caught:
        et.load(source, offline=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.safetensors", "model.gguf", "notes.txt"])
def test_files_that_are_no_model(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04K\x01.")
    assert name in refusal(tmp_path / name)


def test_a_folder_of_pickles(tmp_path: Path) -> None:
    write_config(tmp_path / "config.json", hf_config())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    assert "pytorch_model.bin" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}'])
def test_a_broken_generation_config(text: str, tmp_path: Path) -> None:
    folder, _ = write_tiny(tmp_path)
    (folder / "generation_config.json").write_text(text)
    assert "generation_config.json" in refusal(folder)


def test_the_buffers_of_old_checkpoints_are_no_weights(tmp_path: Path) -> None:
    folder, weights = write_tiny(tmp_path)
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    write_folder(folder, hf_config(), weights | inv_freq)
    assert et.load(folder).named_parameters().keys() == weights.keys()


def test_a_folder_without_config_or_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "consolidated.safetensors").write_bytes(b"x")
    assert "Mistral's own format" in refusal(tmp_path)
    write_config(tmp_path / "config.json", hf_config())
    assert "Mistral's own format" in refusal(tmp_path)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"]
)
def test_a_git_lfs_pointer_in_the_place_of_a_file(name: str, tmp_path: Path) -> None:
    folder, _ = write_tiny(tmp_path)
    (folder / name).write_text(LFS)
    message = refusal(folder)
    assert message.startswith(str(folder / name))
    assert "run `git lfs pull`" in message


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
        *("model.safetensors", "chat_template.jinja"),
    ],
)
def test_a_link_that_leads_nowhere_in_the_place_of_a_file(name: str, tmp_path: Path) -> None:
    folder, _ = write_tiny(tmp_path)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("gone")
    assert f"{name}: a broken link" in refusal(folder)
    assert "a broken link" in refusal(folder / name)


def test_a_shard_or_part_that_is_a_link_to_nothing(tmp_path: Path) -> None:
    golden = load_golden("llama_gqa")
    write_model_gguf(tmp_path / "m.gguf", golden.config, golden.weights, tensors_each=9)
    part = max(tmp_path.iterdir())
    part.unlink()
    part.symlink_to("gone")
    assert f"{part}: a broken link" in refusal(min(tmp_path.iterdir()))
    folder = tmp_path / "shards"
    folder.mkdir()
    write_config(folder / "config.json", golden.config)
    write_safetensors_folder(folder, golden.weights, 20_000)
    shard = max(folder.glob("*.safetensors"))
    shard.unlink()
    shard.symlink_to("gone")
    assert f"{shard}: a broken link" in refusal(folder)


def test_a_gguf_file_named_json_is_a_gguf_file(tmp_path: Path) -> None:
    golden = load_golden("llama_gqa")
    path = write_model_gguf(tmp_path / "x.json", golden.config, golden.weights)
    np.testing.assert_allclose(et.load(path).logits(golden.tokens), golden.logits, atol=1e-4)


def test_contents_decide_what_a_source_is(tmp_path: Path) -> None:
    """A config and a GGUF file without their suffixes, and a GGUF file alone in a folder."""
    golden = load_golden("llama_gqa")
    whole = write_model_gguf(tmp_path / "m.gguf", golden.config, golden.weights)
    expected = et.load(whole).logits(golden.tokens)
    bare = tmp_path / "blob"
    whole.rename(bare)
    (tmp_path / "folder").mkdir()
    parts = write_model_gguf(tmp_path / "folder" / "m.gguf", golden.config, golden.weights, tensors_each=9)
    assert not parts.exists()
    first = min((tmp_path / "folder").iterdir())
    config = tmp_path / "settings.txt"
    config.write_text(json.dumps(golden.config))
    for source in (bare, tmp_path / "folder", first, max((tmp_path / "folder").iterdir())):
        model = et.load(source)
        np.testing.assert_array_equal(model.logits(golden.tokens), expected)
        assert read_config(source) == model.config
        assert look(find(source, Options()), Options()).keys["llama.block_count"] == 3
    assert read_config(config).model_type == et.load(config).config.model_type == "llama"
    assert look(find(config, Options()), Options()).keys == golden.config


def test_a_config_beside_a_gguf_model_does_not_hide_it(tmp_path: Path) -> None:
    golden = load_golden("llama_gqa")
    write_model_gguf(tmp_path / "m.gguf", golden.config, golden.weights)
    (tmp_path / "config.json").write_text(json.dumps(golden.config))
    assert et.load(tmp_path).source.endswith("m.gguf")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.type": "adapter"}, "of type 'adapter', not a model: give the base model"),
        ({"general.type": "mmproj"}, "of type 'mmproj', not a model: a projector"),
        ({"general.type": "imatrix"}, "of type 'imatrix', not a model: an importance matrix"),
        ({"general.architecture": "clip"}, "of type 'mmproj'"),
        ({"adapter.type": "lora"}, "of type 'adapter', not a model: give the base model"),
        ({"llama.block_count": 1 << 31}, "llama.block_count is 2147483648, but the file has only"),
    ],
)
def test_gguf_files_that_are_no_models(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    golden = load_golden("llama_gqa")
    path = write_model_gguf(tmp_path / "x.gguf", golden.config, golden.weights, **keys)
    assert message in refusal(path)
    with pytest.raises(et.InputError, match=re.escape(message)):
        read_config(path)


@pytest.mark.parametrize("kind", ["Model", "finetune", "LLM", 3])
def test_any_other_type_of_a_whole_gguf_model_is_taken_for_a_model(kind: Any, tmp_path: Path) -> None:
    golden = load_golden("llama_gqa")
    keys = {"general.type": kind}
    path = write_model_gguf(tmp_path / "x.gguf", golden.config, golden.weights, **keys)
    np.testing.assert_allclose(et.load(path).logits(golden.tokens), golden.logits, atol=1e-4)


@pytest.mark.parametrize("architecture", ["flux", "sd3", "wan", "t5encoder", "bert", "mamba"])
@pytest.mark.parametrize("kind", [None, "model", "diffusion"])
def test_gguf_files_of_other_programs_are_named(architecture: str, kind: str | None, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, architecture)
    if kind is not None:
        writer.add_string("general.type", kind)
    writer.add_tensor("double_blocks.0.img_attn.qkv.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = "of type 'diffusion'" if kind == "diffusion" else f"architecture '{architecture}' is not supp"
    assert expected in refusal(path)


def test_a_lora_beside_a_gguf_model_is_not_counted(tmp_path: Path) -> None:
    golden = load_golden("llama_gqa")
    for name, keys in (("a-lora.gguf", {"adapter.type": "lora"}), ("m.gguf", {})):
        write_model_gguf(tmp_path / name, golden.config, golden.weights, **keys)
    assert et.load(tmp_path).source.endswith("m.gguf")


@pytest.mark.parametrize("linked", ["model.safetensors", "model.gguf"])
def test_links_that_leave_the_folder_can_be_allowed(linked: str, tmp_path: Path) -> None:
    golden = load_golden("llama_gqa")
    (tmp_path / "model").mkdir()
    if linked == "model.gguf":
        write_model_gguf(tmp_path / linked, golden.config, golden.weights)
    else:
        write_folder(tmp_path, golden.config, golden.weights)
        (tmp_path / "config.json").rename(tmp_path / "model" / "config.json")
    (tmp_path / "model" / linked).symlink_to(tmp_path / linked)
    assert "`allow_links`" in refusal(tmp_path / "model")
    got = et.load(tmp_path / "model", allow_links=True).logits(golden.tokens)
    np.testing.assert_allclose(got, golden.logits, atol=1e-4)


BASE_MODELS = [
    name for name in MODELS if name in {"llama_mha_tied", "llama_gqa", "phi_half", "gpt2_plain"}
] + [
    *(
        "gemma2_caps",
        "gemma3_text",
        "qwen2_tied",
        "qwen3_tied",
        "gpt_neox_parallel",
        "mpt_alibi",
        "mixtral_mqa",
    ),
]


@pytest.mark.parametrize("name", BASE_MODELS)
def test_a_base_model_is_saved_without_the_prefix(name: str, tmp_path: Path) -> None:
    """As transformers' AutoModel saves it: a tied one is whole, an untied one lacks its head."""
    golden = load_golden(name)
    family = FAMILIES[golden.config["model_type"]]
    bare = {key.removeprefix(family.prefix): w for key, w in golden.weights.items()}
    head = family.checkpoint_name("lm_head.weight")
    folder = write_folder(tmp_path / "in", golden.config, bare)
    model = et.load(folder)
    np.testing.assert_allclose(model.logits(golden.tokens), golden.logits, atol=2e-4)
    model.save(tmp_path / "out")
    np.testing.assert_array_equal(et.load(tmp_path / "out").logits(IDS[:1]), model.logits(IDS[:1]))
    if head in bare:
        headless = {key: w for key, w in bare.items() if not key.startswith(head.removesuffix("weight"))}
        message = refusal(write_folder(tmp_path / "headless", golden.config, headless))
        assert f"{head} is missing, and tie_word_embeddings is false" in message


@pytest.mark.parametrize("prefixes", [("model.", "language_model."), ("", "model.")])
def test_a_multimodal_base_model(prefixes: tuple[str, str], tmp_path: Path) -> None:
    golden = load_golden("gemma3_text")
    config = {"model_type": "gemma3", "text_config": golden.config, "vision_config": {}}
    weights = {
        key.replace("model.", prefixes[0] + "language_model.", 1): w for key, w in golden.weights.items()
    }
    model = et.load(write_folder(tmp_path, config, weights))
    np.testing.assert_allclose(model.logits(golden.tokens), golden.logits, atol=2e-4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        *(
            ({"quantization_config": {"quant_method": name, "bits": 4}}, f"{name!r} checkpoints are not")
            for name in ("bitsandbytes", "mxfp4", "quanto", "hqq", "modelopt")
        ),
        ({"quantization_config": {"quant_method": "torchao"}}, "'torchao' checkpoints"),
        ({"quantization_config": {"load_in_4bit": True}}, "'bitsandbytes' checkpoints"),
        ({"quantization_config": {}}, "quantized checkpoints are not supported"),
    ],
)
def test_quantized_checkpoints_are_named(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder, _ = write_tiny(tmp_path)
    write_config(folder / "config.json", hf_config() | keys)
    found = refusal(folder)
    assert message in found
    assert "use the unquantized" in found


@pytest.mark.parametrize(
    ("keys", "label"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": {"group_size": 64, "bits": 4, "mode": "affine"}}, "MLX"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}, "GPTQ"),
        ({"quantization_config": {"quant_method": "awq"}}, "AWQ"),
        ({"quantization_config": {"quant_method": "fp8"}}, "FP8"),
        ({"compression_config": {"config_groups": {}}}, "compressed-tensors"),
    ],
)
def test_quantized_checkpoints_without_quantized_tensors(
    keys: dict[str, Any], label: str, tmp_path: Path
) -> None:
    folder, _ = write_tiny(tmp_path)
    write_config(folder / "config.json", hf_config() | keys)
    assert f"describes {label} weights, but no tensor is quantized" in refusal(folder)


@pytest.mark.parametrize(
    "suffix", ["qweight", "qzeros", "scales", "weight_scale_inv", "weight.absmax", "SCB"]
)
def test_quantized_tensors_without_a_key_are_named(suffix: str, tmp_path: Path) -> None:
    folder, weights = write_tiny(tmp_path)
    packed = {f"{Q.removesuffix('weight')}{suffix}": np.ones((2, 2), np.uint8)}
    write_folder(folder, hf_config(), weights | packed)
    assert f"quantized weights ({next(iter(packed))}), which are not supported" in refusal(folder)


@pytest.mark.parametrize("every", [True, False])
def test_empty_tensors_of_zero_3_are_named(every: bool, tmp_path: Path) -> None:
    folder, weights = write_tiny(tmp_path)
    empty = {key: np.zeros(0, np.float32) for key in (weights if every else [Q])}
    write_folder(folder, hf_config(), weights | empty)
    message = refusal(folder)
    assert f"{len(empty)} tensors, such as" in message
    assert "zero_to_fp32.py" in message


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("module.", "DistributedDataParallel"),
        ("_orig_mod.", "torch.compile"),
        ("base_model.model.", "merge the adapter"),
    ],
)
def test_wrappers_in_names_are_explained(start: str, message: str, tmp_path: Path) -> None:
    folder, weights = write_tiny(tmp_path)
    write_folder(folder, hf_config(), {f"{start}{name}": w for name, w in weights.items()})
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"model_type": "bert"}, "bert is an encoder"),
        ({"model_type": "t5"}, "t5 is an encoder-decoder"),
        ({"model_type": "clip"}, "clip is a vision model"),
        ({"model_type": "whisper"}, "whisper is an audio model"),
        ({"model_type": "mamba"}, "mamba is a recurrent"),
        ({"model_type": "unheard", "is_encoder_decoder": True}, "unheard is an encoder-decoder"),
        ({"model_type": "llava", "vision_config": {}}, "llava is a multimodal model"),
    ],
)
def test_models_that_are_no_decoders_are_named(keys: dict[str, Any], kind: str, tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.json", keys)
    assert f"is not supported; supported: {', '.join(FAMILIES)}" in refusal(path)
    assert kind in refusal(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "LORA", "base_model_name_or_path": "o/base"}, "an adapter of 'o/base', not a model"),
        (
            {"fine_tune_type": "lora", "model": "o/base"},
            "an adapter of 'o/base' of mlx-lm, not a model: give the base",
        ),
        (
            {"lora_parameters": {}},
            "an adapter of mlx-lm, not a model: give the base model, and the adapter",
        ),
        ({"fine_tune_type": "full", "model": "o/base"}, "merge it with `mlx_lm.fuse`"),
        ({"weight_map": {}}, "an index of shards, not a config"),
        ({"dim": 64, "n_layers": 2}, "params.json of Meta's or Mistral's own format"),
        ({"_class_name": "UNet", "sample_size": 64}, "part of a diffusers pipeline"),
    ],
)
def test_json_files_that_are_no_configs_are_named(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    path.write_text(json.dumps(keys))
    assert message in refusal(path)
    if "adapter" in message:
        path.rename(tmp_path / "adapter_config.json")
        assert message in refusal(tmp_path)


def test_an_adapter_beside_a_model_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, _ = write_tiny(tmp_path)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    et.load(folder)
    assert "adapter_config.json: not used" in caplog.text


ABSURD = [
    ({"num_local_experts": 65536}, "65536 experts in each of 3 layers"),
    ({"num_local_experts": 4096}, "4096 experts in each of 3 layers"),
    ({"num_hidden_layers": 4096}, "4096 layers in the config, only"),
    ({"num_hidden_layers": 1 << 32}, "num_hidden_layers is 4294967296, at most"),
    ({"num_hidden_layers": 1e300}, "num_hidden_layers is 1e+300, at most"),
    ({"num_hidden_layers": 1 << 32, "num_local_experts": 65536}, "num_hidden_layers is 4294967296, at most"),
]


@pytest.mark.parametrize(("keys", "message"), ABSURD)
def test_absurd_numbers_are_refused_before_names_are_made(
    keys: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load_golden("mixtral_mqa")
    folder = write_folder(tmp_path, golden.config | keys, golden.weights)
    for module in ("weights", "checks"):
        monkeypatch.delattr(f"einsum_transformer.loading.{module}.weights_of")
    assert message in refusal(folder)
    config = write_config(tmp_path / "alone.json", golden.config | keys)
    if keys.get("num_hidden_layers", 0) > 4096 or keys.get("num_local_experts", 0) * 3 > 1 << 16:
        assert str(config) in refusal(config)
        with pytest.raises(et.InputError, match="at most"):
            read_config(config)


def test_a_run_config_is_bounded_as_well(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for keys in ({"n_layers": 1 << 24}, {"arch_keys": {"num_hidden_layers": 1 << 60}}):
        path.write_text(json.dumps({"arch": "llama"} | keys))
        assert "layers are supported" in refusal(path)
    path.write_text(json.dumps({"arch": "llama", "use_moe": True, "num_experts": 65536}))
    assert "num_experts is 65536 in each of 8 layers" in refusal(path)


def test_large_real_models_are_within_the_bounds(tmp_path: Path) -> None:
    """126 layers (Llama 3.1 405B), and 94 layers of 128 experts (Qwen3 235B)."""
    config = hf_config(num_hidden_layers=126)
    assert read_config(write_config(tmp_path / "a.json", config)).num_hidden_layers == 126
    config = load_golden("qwen3_moe_window").config | {"num_hidden_layers": 94}
    config |= {"layer_types": None, "num_experts": 128, "num_local_experts": 128}
    read = read_config(write_config(tmp_path / "b.json", config))
    assert read.moe is not None
    assert read.moe.num_experts == 128
