"""Compare llama.cpp on GGUF files with transformers on their source checkpoints.

python tools/check_gguf.py [CASE ...] prints the largest difference of the logits of each case, for the files
of tests/gguf_files.py and those of `et.convert`."""

import argparse
import json
import sys
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_cpp import Llama
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import einsum_transformer as et
from gguf_files import write_model_gguf

F32 = 0
GELU = (torch.nn.GELU, GELUTanh, NewGELUActivation)
SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 32}


@dataclass(frozen=True, slots=True)
class Case:
    """A tiny model; `config` overrides the keys of SIZES."""

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    length: int = 24
    context: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of write_model_gguf."""


def rope(kind: str, **keys: Any) -> dict[str, Any]:
    """The rope_parameters of a config."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **keys}}


GEMMA = HEADS | {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 8}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GROWING = [1.0 + 0.25 * i for i in range(6)]
LONGROPE = rope(
    "longrope",
    partial_rotary_factor=0.75,
    original_max_position_embeddings=32,
    short_factor=GROWING,
    long_factor=[3 * f for f in GROWING],
) | {"original_max_position_embeddings": 32, "max_position_embeddings": 256}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "topk_method": "greedy",
    "topk_group": 1,
    "n_group": 1,
}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0)
MSCALE = rope("yarn", factor=40.0, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=0.707)

CASES = {
    "gemma3": Case(
        "gemma3_text",
        GEMMA
        | {
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 32,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ),
    "gemma2": Case(
        "gemma2",
        GEMMA | {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "qwen3": Case("qwen3", HEADS | {"tie_word_embeddings": True}),
    "phi2": Case(
        "phi",
        rope("default", partial_rotary_factor=0.5) | {"intermediate_size": 256, "num_key_value_heads": 4},
    ),
    "phi3": Case("phi3", rope("default") | {"sliding_window": None}),
    "phi3 longrope short": Case("phi3", LONGROPE, context=32),
    "phi3 longrope long": Case("phi3", LONGROPE, length=48),
    "gpt2": Case("gpt2", {"n_inner": 256}),
    "gptneox": Case("gpt_neox", rope("default", partial_rotary_factor=0.5) | {"hidden_act": "gelu_new"}),
    "gptneox sequential": Case(
        "gpt_neox",
        rope("default", partial_rotary_factor=0.25)
        | {"hidden_act": "gelu_new", "use_parallel_residual": False},
    ),
    "gemma": Case("gemma", GEMMA | {"hidden_act": "gelu_pytorch_tanh"}),
    "olmo2": Case("olmo2", rope("default", rope_theta=5e5)),
    "smollm3": Case("smollm3", rope("default", rope_theta=2e6) | {"num_hidden_layers": 5}),
    "granite": Case(
        "granite",
        rope("default")
        | {
            "embedding_multiplier": 3.5,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.45,
            "logits_scaling": 1.75,
            "attention_bias": True,
        },
    ),
    "mpt": Case("mpt", {}),
    "mixtral": Case("mixtral", rope("default", rope_theta=1e6) | {"num_local_experts": 5, "head_dim": 16}),
    "qwen2moe": Case(
        "qwen2_moe", MOE | {"num_experts": 6, "shared_expert_intermediate_size": 64, "norm_topk_prob": False}
    ),
    "qwen3moe": Case("qwen3_moe", MOE | HEADS | {"num_experts": 6, "norm_topk_prob": True}),
    "deepseek2": Case("deepseek_v2", MOE | MLA | rope("default")),
    "deepseek2 lite": Case("deepseek_v2", MOE | MLA | rope("default") | {"q_lora_rank": None}),
    "deepseek2 yarn": Case("deepseek_v2", MOE | MLA | MSCALE),
    "deepseek2 expanded": Case("deepseek_v2", MOE | MLA | MSCALE, options={"expanded": True}),
    "llama": Case("llama", HEADS | {"attention_bias": True, "mlp_bias": True}),
    "llama yarn": Case("llama", YARN),
    "mistral": Case("mistral", HEADS | {"sliding_window": None}),
    "qwen2": Case("qwen2", rope("default", rope_theta=1e6)),
}


class HalfGelu(torch.nn.Module):
    """llama.cpp's GELU: the tanh approximation from a table in half precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def random_model(case: Case, seed: int) -> Any:
    """The transformers model of the case, with all parameters random."""
    config = AutoConfig.for_model(case.family, **json.loads(json.dumps(SIZES | case.config)))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for module in list(model.modules()):
        for child, activation in module.named_children():
            if isinstance(activation, GELU):
                setattr(module, child, HalfGelu())
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for value in model.parameters():
            scale = 0.2 if value.ndim == 1 else value.shape[-1] ** -0.5
            noise = torch.from_numpy(rng.standard_normal(tuple(value.shape)) * scale).float()
            value.copy_(value + noise if value.ndim == 1 else noise)
    return model


def check(name: str) -> tuple[float, float | str, float]:
    """The largest difference of the logits for both files, and the largest logit."""
    case, seed = CASES[name], zlib.crc32(name.encode())
    model = random_model(case, seed)
    tokens = np.random.default_rng(seed + 1).integers(0, SIZES["vocab_size"], case.length)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        weights = load_file(Path(folder) / "model.safetensors")
        vocabulary = {"tokenizer.ggml.model": "none", "{arch}.vocab_size": SIZES["vocab_size"]}
        path = write_model_gguf(Path(folder) / "model.gguf", config, weights, **vocabulary, **case.options)
        actual = llama_cpp_logits(path, case.context, tokens.tolist())
        own: float | str
        try:
            converted = et.convert(folder, Path(folder) / "own.gguf", "F32")
            own = float(np.abs(llama_cpp_logits(converted, case.context, tokens.tolist()) - expected).max())
        except et.InputError as error:
            own = str(error).removeprefix(f"{folder}: ")
    return float(np.abs(actual - expected).max()), own, float(np.abs(expected).max())


def llama_cpp_logits(path: Path, context: int, tokens: list[int]) -> np.ndarray:
    """Logits (t, v) of the tokens, with a float32 cache and without flash attention."""
    # -1 selects the value of the file
    yarn = {f"yarn_{key}": -1.0 for key in ("ext_factor", "attn_factor", "beta_fast", "beta_slow")}
    model = Llama(
        str(path),
        n_ctx=context,
        n_batch=context,
        logits_all=True,
        type_k=F32,
        type_v=F32,
        verbose=False,
        **yarn,
    )
    model.eval(tokens)
    logits = model.scores[: len(tokens)].copy()
    model.close()
    return logits


def main() -> None:
    """Check the cases of the command line, by default all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in parser.parse_args().cases or CASES:
        difference, own, largest = check(name)
        own = own if isinstance(own, str) else f"{own:.1e}"
        print(f"{name:24} {difference:.1e}, converted {own}, of {largest:.1f}", flush=True)


if __name__ == "__main__":
    main()
