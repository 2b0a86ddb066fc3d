import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from mae_core import neighbours
from mae_core.errors import UserError
from mae_core.neighbours import knn_probabilities

OPTIONS = {"num_classes": 4, "num_neighbours": 7, "temperature": 0.07}


def draw(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return torch.randn(count, 12, generator=generator) * 3 + torch.eye(4, 12)[labels] * 4, labels


def test_it_is_scikit_learns_with_the_same_weights():
    (queries, _), (bank, labels) = draw(50, 0), draw(200, 1)
    # The metric's distance is 1 - cosine similarity.
    reference = KNeighborsClassifier(7, metric="cosine")
    reference.set_params(weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = reference.fit(bank.numpy(), labels.numpy()).predict_proba(queries.numpy())
    found = knn_probabilities(queries, bank, labels, **OPTIONS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_it_finds_the_neighbours_that_faiss_finds():
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is in the extra `pipeline`")
    (queries, _), (bank, labels) = draw(50, 0), draw(200, 1)
    index = faiss.IndexFlatIP(12)
    index.add(torch.nn.functional.normalize(bank).numpy())
    _, nearest = index.search(torch.nn.functional.normalize(queries).numpy(), 1)
    found = knn_probabilities(queries, bank, labels, num_classes=4, num_neighbours=1, temperature=0.07)
    assert found.argmax(1).tolist() == labels[torch.from_numpy(nearest[:, 0])].tolist()


def test_chunks_change_nothing(monkeypatch):
    (queries, _), (bank, labels) = draw(50, 0), draw(200, 1)
    whole = knn_probabilities(queries, bank, labels, **OPTIONS)
    monkeypatch.setattr(neighbours, "_MAX_SCORES", 1)
    torch.testing.assert_close(knn_probabilities(queries, bank, labels, **OPTIONS), whole)


def test_more_neighbours_than_images_are_refused():
    bank, labels = draw(6, 1)
    with pytest.raises(UserError, match="num_neighbours 7 exceeds the 6 training images; try 6"):
        knn_probabilities(bank, bank, labels, **OPTIONS)
