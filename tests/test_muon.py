"""The tiny checkpoint's optimizer: orthogonalized updates for matrices, torch's AdamW for the rest."""

import copy

import pytest
import torch
from muon_optimizer import Muon, orthogonalize
from muon_training import NUM_STEPS, build_model, train, train_in_a_group
from torch import multiprocessing, nn


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (32, 64)])
def test_singular_values_become_near_one_and_vectors_stay_the_same(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.6 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.mT @ orthogonalize(matrix) @ right.mT
    torch.testing.assert_close(turned, turned.diagonal().diag(), atol=1e-4, rtol=0)


def test_a_zero_gradient_changes_nothing():
    assert not orthogonalize(torch.zeros(4, 8)).any()


def test_the_first_update_is_as_large_as_adamws():
    model = build_model()
    before = model[0].weight.detach().clone()
    train(model, Muon(model, 0.01, weight_decay=0.0), 1)
    length = (model[0].weight.detach() - before).square().mean().sqrt()
    assert 0.1 < length / 0.01 < 0.3  # Liu et al.: 0.2


def test_embeddings_and_vectors_are_updated_by_torch_adamw():
    model = build_model()
    vectors = [model[0].bias, *model[3].parameters(), model.embed_tokens.weight]
    gradients = [torch.randn_like(vector) for vector in vectors]
    ours = Muon(model, 0.01, weight_decay=0.1)
    twins = [nn.Parameter(vector.detach().clone()) for vector in vectors]
    theirs = torch.optim.AdamW(twins, 0.01, weight_decay=0.1)
    for _ in range(NUM_STEPS):
        for vector, twin, gradient in zip(vectors, twins, gradients, strict=True):
            vector.grad, twin.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    for vector, twin in zip(vectors, twins, strict=True):
        assert torch.equal(vector, twin)


def test_named_parts_are_updated_by_torch_adamw_at_their_learning_rate():
    model = build_model()
    weights = dict(model.named_parameters())
    ours = Muon(model, 0.01, weight_decay=0.1, adamw={r"^0\.weight": 0.001, r"^[02]": 0.002, "nowhere": 0.1})
    rates = {"0.weight": 0.001, "0.bias": 0.002, "2.weight": 0.002, "3.weight": 0.01, "embed_tokens.weight": 0.01}
    twins = {name: nn.Parameter(weights[name].detach().clone()) for name in rates}
    theirs = torch.optim.AdamW([{"params": [twins[name]], "lr": lr} for name, lr in rates.items()], weight_decay=0.1)
    for _ in range(NUM_STEPS):
        for name, twin in twins.items():
            twin.grad = torch.randn_like(twin)
            weights[name].grad = twin.grad.clone()
        ours.step()
        theirs.step()
    for name, twin in twins.items():
        assert torch.equal(weights[name], twin), name


def test_frozen_weights_are_skipped():
    model = build_model()
    model[0].requires_grad_(False)
    taken = {id(weight) for group in Muon(model, 0.01).param_groups for weight in group["params"]}
    assert taken == {id(weight) for weight in model.parameters() if weight.requires_grad}


def test_a_saved_optimizer_resumes_exactly(tmp_path):
    model = build_model()
    optimizer = Muon(model, 0.01)
    train(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    copied = copy.deepcopy(model)
    resumed = Muon(copied, 0.01)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(model, optimizer, start=NUM_STEPS)
    train(copied, resumed, start=NUM_STEPS)
    for weight, other in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(weight, other)


@pytest.mark.slow
def test_two_processes_update_like_one(tmp_path):
    alone = build_model()
    train(alone, Muon(alone, 0.01))
    multiprocessing.spawn(train_in_a_group, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, weight in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, atol=1e-6, rtol=0)
