"""A job for test_two_nodes: two gloo workers add up their ranks; the sum and each one's node go to stdout as JSON."""

import json
import sys
import tempfile

import ray
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def work() -> None:
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    found = {"total": total.item(), "rank": dist.get_rank(), "node": ray.get_runtime_context().get_node_id()}
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    ray.init()
    scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}, placement_strategy="STRICT_SPREAD")
    with tempfile.TemporaryDirectory() as folder:
        TorchTrainer(work, scaling_config=scaling, run_config=RunConfig(storage_path=folder)).fit()
    sys.exit(0)
