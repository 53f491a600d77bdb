"""The location of each weight in a checkpoint: its tensor, its rows in the tensor, and their order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from einsum_transformer.formats import TensorSource
from einsum_transformer.leaves.resident import Stored
from einsum_transformer.models.builder import WeightSpec
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.families.family import Family

Shape = tuple[int, ...]

EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj")


@dataclass(frozen=True, slots=True)
class Place:
    """The location of a weight, and the required shapes of the tensors that contain it."""

    stored: Stored
    shapes: Mapping[str, Shape]


def folder_place(weight: WeightSpec, family: Family, config: ModelConfig, tensors: TensorSource) -> Place:
    """Locate a weight in a Hugging Face folder. Experts have one tensor each, or share one tensor per layer,
    with the rows of gate before those of up."""
    name = family.checkpoint_name(weight.path)
    if (expert := EXPERT.fullmatch(weight.path)) and config.moe is not None:
        fused = family.checkpoint_name(f"{expert['experts']}.gate_up_proj").removesuffix(".weight")
        if fused in tensors.names():
            return _fused_expert(weight, expert, fused, config.moe.num_experts)
    if family.is_transposed(weight.path):
        return Place(Stored(name, weight.stored, np.transpose), {name: weight.stored[::-1]})
    return Place(Stored(name, weight.stored), {name: weight.stored})


def _fused_expert(weight: WeightSpec, expert: re.Match[str], fused: str, experts: int) -> Place:
    rows, columns = weight.stored
    if expert["part"] == "down":
        name = f"{fused.removesuffix('gate_up_proj')}down_proj"
        return stacked(weight, name, int(expert["index"]) * rows, (experts, rows, columns))
    first = (2 * int(expert["index"]) + (expert["part"] == "up")) * rows
    return stacked(weight, fused, first, (experts, 2 * rows, columns))


def stacked(weight: WeightSpec, name: str, first_row: int, shape: Shape) -> Place:
    """Locate one expert's rows in the tensor of all experts of a layer."""
    return Place(Stored(name, weight.stored, first_row=first_row), {name: shape})
