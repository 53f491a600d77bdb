"""A simulated cluster of two machines gives the same weights, also when a machine is removed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cluster_runs import STEPS, final, snapshot, trainer
from einsum_transformer.cluster.data_parallel import RayWorkers
from einsum_transformer.cluster.pool import import_ray
from einsum_transformer.errors import InputError
from einsum_transformer.training.loop import Local

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]
MACHINE = {"num_cpus": 2, "object_store_memory": 1 << 27, "include_dashboard": False}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head node with two CPUs, to which this process connects by address."""
    ray = import_ray(local=True)
    utils = importlib.import_module("ray.cluster_utils")
    found = utils.Cluster(initialize_head=True, head_node_args=MACHINE)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.mark.parametrize("shard_optimizer", [False, True])
def test_removing_a_machine_changes_nothing(cluster: Any, shard_optimizer: bool) -> None:
    second = cluster.add_node(**MACHINE)
    made = trainer(RayWorkers(4, cluster.address, 2, 60, shard_optimizer).compute())
    with made.compute as compute:
        nodes = [place.node for place in compute.pool.places]
        assert nodes[0] != nodes[1]
        assert nodes == nodes[:2] * 2
        assert compute.pool.threads == [1] * 4
        list(made.run(2))
        cluster.remove_node(second, allow_graceful=False)
        list(made.run(STEPS))
        assert len({place.node for place in compute.pool.places}) == 1
        found = snapshot(made)
    expected = final(Local)
    for name, array in expected.items():
        assert np.linalg.norm(found[name] - array) <= 1e-12 * np.linalg.norm(array), name


def test_more_workers_than_the_cluster_has_cpus(cluster: Any) -> None:
    with pytest.raises(InputError, match=r"^[0-2] of 3 Ray workers started within 5 s.*a free CPU"):
        trainer(RayWorkers(3, cluster.address, 2, 5).compute())
    assert not import_ray(local=True).is_initialized()
