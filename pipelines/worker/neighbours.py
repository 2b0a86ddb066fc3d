"""The kNN probe on one rank: every rank holds the features of the training split and classifies its share of images."""

from typing import Any

import torch

from mae_core.neighbours import knn_probabilities
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import ClassifyJob, IndexedDataset, read_plan, train_plan
from pipelines.runs.metrics import MetricSpool
from pipelines.worker.finetuning import accuracy_of, hits, result_of
from pipelines.worker.probing import frozen_encoder, read_split, read_table
from pipelines.worker.rank import Feed, Rank


@torch.inference_mode()
def run(job: ClassifyJob, dataset: IndexedDataset, rank: Rank, feed: Feed, folder: RunFolder) -> dict[str, Any]:
    """Classify the evaluation split by its neighbours in the training split; return the job's result."""
    config = job.config
    encode = frozen_encoder(job, rank)
    table = read_table(job, dataset, rank, feed, encode)
    counts = torch.zeros(3, dtype=torch.float64, device=rank.device)
    for batch in read_split(rank, read_plan(job, dataset, config.eval_split), feed):
        votes = knn_probabilities(
            encode(batch),
            table.features,
            table.labels,
            num_classes=len(job.classes),
            num_neighbours=config.classifier.num_neighbours,
            temperature=config.classifier.temperature,
        )
        counts += hits(votes, batch.labels, batch.weights)
    accuracy = accuracy_of(rank, counts, config.eval_split)
    if rank.is_main:
        spool = MetricSpool(folder.storage)
        spool.add(0, accuracy)
        spool.close()
    return result_of(job, accuracy, 0, train_plan(job, dataset).num_samples)
