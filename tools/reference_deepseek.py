"""DeepSeekMoE 16B as published (Dai et al., 2024), which transformers does not have: Llama with routed and
shared experts instead of the feed-forward layer."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class Experts(nn.Module):
    """A softmax router, the top-k routed experts of each token, and a shared expert for all tokens."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        keys = config.experts

        def mlp(width: int) -> LlamaMLP:
            own = copy.deepcopy(config)
            own.intermediate_size = width
            return LlamaMLP(own)

        size = keys["moe_intermediate_size"]
        self.gate = nn.Linear(config.hidden_size, keys["n_routed_experts"], bias=False)
        self.experts = nn.ModuleList(mlp(size) for _ in range(keys["n_routed_experts"]))
        self.shared_experts = mlp(size * keys["n_shared_experts"])
        self.top_k, self.normalize = keys["num_experts_per_tok"], keys["norm_topk_prob"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's experts, one token at a time, plus the shared expert."""
        weight, index = torch.topk(self.gate(x).softmax(dim=-1), self.top_k, dim=-1)
        if self.normalize and self.top_k > 1:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        rows, w, chosen = x.flatten(0, 1), weight.flatten(0, 1), index.flatten(0, 1)
        routed = [
            sum(w[n, j] * self.experts[int(chosen[n, j])](row) for j in range(self.top_k))
            for n, row in enumerate(rows)
        ]
        return torch.stack(routed).view_as(x) + self.shared_experts(x)


EXPERT_KEYS = (
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_shared_experts",
    "first_k_dense_replace",
    "moe_layer_freq",
    "norm_topk_prob",
)


def build_deepseek(keys: dict[str, Any]) -> nn.Module:
    """The model of a config with the keys of model_type "deepseek"."""
    experts = {name: keys[name] for name in EXPERT_KEYS}
    plain = {name: value for name, value in keys.items() if name not in EXPERT_KEYS}
    config = LlamaConfig(**plain, attn_implementation="eager", dtype="float32")
    config.experts = experts
    model = LlamaForCausalLM(config)
    for i, layer in enumerate(model.model.layers):
        if i >= experts["first_k_dense_replace"] and i % experts["moe_layer_freq"] == 0:
            layer.mlp = Experts(config)
    return model
