"""What is told about a router is what it did."""

import json
from pathlib import Path

import numpy as np
import pytest

from einsum_transformer.analysis.routing import LayerRouting, RoutingReader
from einsum_transformer.cli.app import main
from einsum_transformer.engine import Recorder, einsum
from golden_files import Folders, Models, load_golden


def test_counts_are_those_of_the_router(golden_model: Models) -> None:
    """Over two passes, of the first layer, whose router sees what the pass before it gives."""
    golden, model = load_golden("mixtral_window"), golden_model("mixtral_window")
    reader = RoutingReader()
    with Recorder(values="*").on_value(reader, *reader.NAMES) as recorder:
        model.logits(golden.tokens)
    first = reader.layers()[0]
    block = model.decoder.layers[0]
    x = recorder.values["embed_tokens"] + recorder.values["layers.0.self_attn"]
    normed = block.post_attention_layernorm.forward(x)[0]
    chosen, w, p = block.mlp.routing.forward(einsum("btd,ed->bte", normed, block.mlp.gate))
    expected = np.bincount(chosen.ravel(), minlength=7)
    assert first.choices == tuple(expected)
    assert sum(first.choices) == 2 * golden.tokens.size
    for e in range(7):
        mean = w[chosen == e].mean() if expected[e] else 0
        assert first.mean_weight[e] == pytest.approx(mean, rel=1e-5)
    assert first.entropy == pytest.approx(-(p * np.log2(p)).sum(-1).mean(), rel=1e-5)
    assert [each.layer for each in reader.layers()] == [0, 1, 2]


def test_numbers_of_a_layer() -> None:
    even = LayerRouting(0, (4, 4, 4, 4), (0.5,) * 4, 2.0)
    assert (even.imbalance, even.idle, even.load_entropy) == (1.0, 0, 2.0)
    one = LayerRouting(0, (0, 8, 0, 0), (0.0, 1.0, 0.0, 0.0), 0.0)
    assert (one.imbalance, one.idle, one.load_entropy) == (4.0, 3, 0.0)


def test_nothing_is_counted_without_a_recorder_or_experts(golden_model: Models) -> None:
    reader = RoutingReader()
    with Recorder().on_value(reader, *reader.NAMES):
        golden_model("llama_gqa").logits(load_golden("llama_gqa").tokens)
    assert reader.layers() == []


def test_in_the_output_of_run(
    golden_folder: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def output(*arguments: str) -> tuple[str, str]:
        with pytest.raises(SystemExit, match="0"):
            main(["run", str(folder), "--tokens", str(ids), "-n", "3", "--temp", "0", *arguments])
        return capsys.readouterr()

    golden = load_golden("qwen2_moe_dense_layer")
    folder = golden_folder("qwen2_moe_dense_layer")
    ids = tmp_path / "ids.npy"
    np.save(ids, golden.tokens[:1, :5])
    said = json.loads(output("--json")[0])
    assert [each["layer"] for each in said["routing"]] == [0, 2]
    assert all(sum(each["choices"]) == 3 * (5 + 2) for each in said["routing"])
    shown = output()[1]
    assert "layer 2" in shown
    assert "max / mean" in shown
