"""Components compared with transformers: RoPE frequencies and rotation, RMSNorm, sampling distributions."""

import json
from typing import Any

import numpy as np
import pytest

from einsum_transformer.components.attention import Attention
from einsum_transformer.components.context import Context
from einsum_transformer.components.mixing import Mixing
from einsum_transformer.components.rmsnorm import RMSNorm
from einsum_transformer.components.rope import RopeConfig, inverse_frequencies, rotation
from einsum_transformer.generation.sampling import Sampling
from einsum_transformer.models.config import Keys
from einsum_transformer.models.families.family import read_rope
from golden_files import load_parts, load_sinks

ROPE = load_parts("rope")
ROPES = sorted({key.split("/")[0] for key in ROPE})
ROTATION = load_parts("rotation")
ROTATIONS = sorted({key.split("/")[0] for key in ROTATION})
NORM = load_parts("norm")
SAMPLING = load_parts("sampling")
SAMPLERS: list[dict[str, float]] = json.loads(str(SAMPLING["parameters"]))


# Only these five functions call the components of this package.


def our_inv_freq(case: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Inverse frequencies (head_dim / 2,) in float64 and the factor of cos and sin at `length`.

    case: rope_parameters (as in config.json), head_dim, max_position_embeddings, length.
    """
    keys = Keys({"rope_parameters": case["rope_parameters"]}, "case")
    rope = read_rope(keys, case["max_position_embeddings"])
    return inverse_frequencies(rope, case["head_dim"], case["length"])


def our_rotation(case: dict[str, Any], q: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Heads q (b, t, heads, head_dim), float32, rotated by their positions (t,); `case` as above."""
    keys = Keys({"rope_parameters": case["rope_parameters"]}, "case")
    rope = read_rope(keys, case["max_position_embeddings"])
    return rotation(rope, case["head_dim"], np.broadcast_to(positions, q.shape[:2]), q.dtype).forward(q)


def our_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm of x (b, t, d), float32, over d."""
    return RMSNorm(weight, eps).forward(x)[0]


def our_norm_gradients(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """(dx, dweight) of RMSNorm for dy (b, t, d), float32."""
    norm = RMSNorm(weight, eps)
    dx, gradient = norm.backward(dy, norm.forward(x)[1])
    return dx, gradient.weight


def our_probabilities(logits: np.ndarray, history: np.ndarray, parameters: dict[str, float]) -> np.ndarray:
    """Sampling probabilities (v,) of the token after `history` (n,), given its logits (v,).

    parameters: any of repetition_penalty, temperature, top_k, top_p, min_p; a missing one is disabled.
    """
    sampler = Sampling(**{"temperature": 1.0} | parameters).sampler(history.tolist())
    return sampler.probabilities(logits, history.tolist())


def case_of(name: str) -> dict[str, Any]:
    """The parameters of a RoPE case."""
    return json.loads(str(ROPE[f"{name}/case"]))


def assert_rows(ours: np.ndarray, reference: np.ndarray, tolerance: float) -> None:
    """Check every row (last axis) relative to its largest element."""
    assert ours.shape == reference.shape
    scale = np.abs(reference).max(axis=-1, keepdims=True)
    assert (np.abs(ours - reference) <= tolerance * scale).all()


@pytest.mark.parametrize("name", ROPES)
def test_inverse_frequencies(name: str) -> None:
    """Compared with the formulas of transformers in float64, and with its float32 values."""
    ours, scaling = our_inv_freq(case_of(name))
    np.testing.assert_allclose(ours, ROPE[f"{name}/inv_freq"], rtol=1e-12, atol=0)
    np.testing.assert_allclose(ours, ROPE[f"{name}/inv_freq_float32"], rtol=1e-6, atol=0)
    np.testing.assert_allclose(scaling, float(ROPE[f"{name}/scaling"]), rtol=1e-12)


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotation_near(name: str) -> None:
    """Positions at which float32 angles are accurate, compared with transformers itself."""
    q, positions = ROTATION[f"{name}/q"], ROTATION[f"{name}/near"]
    assert_rows(our_rotation(case_of(name), q, positions), ROTATION[f"{name}/near_rotated"], 5e-6)


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotation_far(name: str) -> None:
    """Positions up to 131,071: angles must not be computed in float32."""
    q, positions = ROTATION[f"{name}/q"], ROTATION[f"{name}/far"]
    assert_rows(our_rotation(case_of(name), q, positions), ROTATION[f"{name}/far_rotated"], 1e-6)


@pytest.mark.parametrize("index", range(NORM["eps"].size))
def test_rmsnorm(index: int) -> None:
    """Ordinary rows, rows with outliers of 1e4, tiny and zero rows."""
    ours = our_norm(NORM["x"], NORM["weight"], float(NORM["eps"][index]))
    assert_rows(ours, NORM[f"y{index}"], 1e-6)


@pytest.mark.parametrize("index", range(NORM["eps"].size))
def test_rmsnorm_gradients(index: int) -> None:
    """Gradients of input and weight; a zero row has the largest gradient, which is finite."""
    dx, dweight = our_norm_gradients(NORM["dy"], NORM["x"], NORM["weight"], float(NORM["eps"][index]))
    assert_rows(dx, NORM[f"dx{index}"], 1e-5)
    assert_rows(dweight, NORM[f"dweight{index}"], 1e-5)


@pytest.mark.parametrize("row", range(len(SAMPLING["logits"])))
@pytest.mark.parametrize("column", range(len(SAMPLERS)), ids=[json.dumps(p) for p in SAMPLERS])
def test_sampling_distribution(row: int, column: int) -> None:
    """The same tokens as transformers keeps, with the same probabilities."""
    ours = our_probabilities(SAMPLING["logits"][row], SAMPLING["histories"][row], SAMPLERS[column])
    reference = SAMPLING["probabilities"][row, column]
    np.testing.assert_array_equal(ours > 0, reference > 0)
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", ["full", "window"])
def test_attention_with_sinks(case: str) -> None:
    """Output and every gradient, in float64."""
    golden = load_sinks()
    config = json.loads(str(golden["config"]))
    kv_heads, h = config["num_key_value_heads"], config["head_dim"]
    groups, d = config["num_attention_heads"] // kv_heads, config["hidden_size"]
    shapes = {"q": (kv_heads, groups, h), "k": (kv_heads, h), "v": (kv_heads, h)}

    def weights(prefix: str) -> dict[str, np.ndarray]:
        found = {"sinks": golden[f"{prefix}sinks"].reshape(kv_heads, groups)}
        for name, shape in shapes.items():
            found[f"{name}_proj"] = golden[f"{prefix}{name}_proj.weight"].reshape(*shape, d)
            found[f"{name}_bias"] = golden[f"{prefix}{name}_proj.bias"].reshape(shape)
        found["o_proj"] = golden[f"{prefix}o_proj.weight"].reshape(d, kv_heads, groups, h)
        return found | {"o_bias": golden[f"{prefix}o_proj.bias"]}

    window = config["sliding_window"] if case == "window" else None
    attention = Attention(**weights(""), mixing=Mixing(h**-0.5, window, query_block=4))
    x, positions = golden["x"], np.arange(golden["x"].shape[1])
    rope = RopeConfig(**config["rope_parameters"])
    context = Context(positions, rotation(rope, h, np.broadcast_to(positions, x.shape[:2]), x.dtype))
    y, saved = attention.forward(x, context)
    np.testing.assert_allclose(y, golden[f"{case}/y"], rtol=0, atol=1e-13)
    dx, gradient = attention.backward(golden["dy"], saved, context)
    np.testing.assert_allclose(dx, golden[f"{case}/dx"], rtol=0, atol=1e-12)
    for name, expected in weights(f"{case}/grad/").items():
        np.testing.assert_allclose(getattr(gradient, name), expected, rtol=0, atol=1e-12, err_msg=name)
