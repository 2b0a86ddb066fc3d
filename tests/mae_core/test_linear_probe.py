import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mae_core.linear_probe import fit_linear_probe

DECAY = 1e-2


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw examples of four overlapping classes, with features of different scales."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    features = torch.randn(count, 10, generator=generator) + 2 * torch.eye(4, 10)[labels]
    return features * torch.logspace(-2, 2, 10) + 3, labels


def test_it_is_scikit_learns_logistic_regression_on_standardized_features() -> None:
    (features, labels), (queries, _) = draw(200, 0), draw(50, 1)
    scaler = StandardScaler().fit(features.double().numpy())
    reference = LogisticRegression(C=1 / (DECAY * len(features)), tol=1e-8, max_iter=1000)
    reference.fit(scaler.transform(features.double().numpy()), labels.numpy())
    probe = fit_linear_probe(features, labels, num_classes=4, weight_decay=DECAY)
    found = probe(queries, torch.ones(50)).softmax(1).numpy()
    expected = reference.predict_proba(scaler.transform(queries.double().numpy()))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_it_depends_on_the_examples_alone() -> None:
    features, labels = draw(100, 0)
    torch.manual_seed(1)
    one = fit_linear_probe(features, labels, num_classes=4, weight_decay=DECAY)
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.rand(()) == after, "torch's global generator is as before"
    other = fit_linear_probe(features, labels, num_classes=4, weight_decay=DECAY)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_feature_that_never_varies_and_a_class_without_examples_are_harmless() -> None:
    features, labels = draw(100, 0)
    features[:, 3] = 2.5
    probe = fit_linear_probe(features, labels, num_classes=6, weight_decay=DECAY)
    predicted = probe(features, torch.ones(100)).argmax(1)
    assert (predicted == labels).double().mean() > 0.6
    assert predicted.max() < 4


def test_more_decay_makes_smaller_weights() -> None:
    features, labels = draw(100, 0)
    norms = [
        float(fit_linear_probe(features, labels, num_classes=4, weight_decay=decay).head.weight.norm())
        for decay in (1e-3, 1e-1, 10.0)
    ]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 0.1 * norms[0]
