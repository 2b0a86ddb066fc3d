"""The kNN probe on one rank: every rank holds the features of the training split and classifies its share of images."""

from typing import Any

import torch

from mae_core.neighbours import knn_probabilities
from pipelines.runs.folder import RunFolder
from pipelines.runs.jobs import ClassifyJob
from pipelines.runs.metrics import MetricSpool
from pipelines.runs.plans import IndexedDataset, read_plan, train_plan
from pipelines.worker.finetuning import result_of
from pipelines.worker.probing import frozen_encoder, read_split, read_table
from pipelines.worker.rank import Feed, Rank
from pipelines.worker.tally import Tally


@torch.inference_mode()
def run(job: ClassifyJob, dataset: IndexedDataset, rank: Rank, feed: Feed, folder: RunFolder) -> dict[str, Any]:
    """Classify the evaluation split by its neighbours in the training split; return the job's result."""
    config = job.config
    encode = frozen_encoder(job, rank)
    table = read_table(job, dataset, rank, feed, encode)
    tally = Tally(rank)
    for batch in read_split(rank, read_plan(job, dataset, config.eval_split), feed):
        votes = knn_probabilities(
            encode(batch),
            table.features,
            table.labels,
            num_classes=len(job.classes),
            num_neighbours=config.classifier.num_neighbours,
            temperature=config.classifier.temperature,
        )
        tally.add(votes, batch)
    accuracy = tally.accuracy(config.eval_split)
    tally.write(folder, config.eval_split)
    if rank.is_main:
        spool = MetricSpool(folder.storage)
        spool.add(0, accuracy)
        spool.close()
    return result_of(job, accuracy, 0, train_plan(job, dataset).num_samples)
