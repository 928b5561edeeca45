"""Training on real data: twenty steps on scikit-learn's digits run the same with and without the swap."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.models import VisionTransformer
from fastvit.swap import swap

datasets = pytest.importorskip("sklearn.datasets")

STEPS, BATCH = 20, 128


def digits() -> tuple[Tensor, Tensor]:
    """Return the 1797 hand-written digits as images [1797, 1, 8, 8] in [-1, 1], and their labels."""
    bunch = datasets.load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(bunch.target)


def small_vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2.0
    )


def train(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the loss of every step, the data order and the initial weights being fixed."""
    images, labels = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    model.to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    losses = []
    for step in range(STEPS):
        chosen = order[(step * BATCH + torch.arange(BATCH)) % len(order)]
        loss = F.cross_entropy(model(images[chosen].to(dtype)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def test_twenty_steps_run_the_same_with_the_swap() -> None:
    plain, fused = small_vit(), small_vit()
    assert swap(fused, strict=True).counts == {"fused": 4}
    exact, without, with_swap = train(copy.deepcopy(plain), torch.float64), train(plain), train(fused)
    torch_error = ((without - exact) / exact).abs().max().item()
    error = ((with_swap - exact) / exact).abs().max().item()
    print(f"losses {with_swap[0]:.4f} to {with_swap[-1]:.4f}; relative error {error:.1e}, torch's own {torch_error:.1e}")
    # AdamW divides by the root of the squared gradient, so a gradient near 0 turns rounding into a step of either sign:
    # the curves part at about 1e-5 within 20 steps in torch's own float32. 1e-3 is far above that and far below what
    # any fault in a gradient does.
    torch.testing.assert_close(with_swap, without, rtol=1e-3, atol=0)
    assert with_swap[0].item() == pytest.approx(2.302585, abs=1e-5)
    assert with_swap[-3:].mean() < 0.6 * with_swap[0]


def test_float64_training_is_the_same_to_rounding() -> None:
    plain, fused = small_vit(), small_vit()
    swap(fused)
    torch.testing.assert_close(train(fused, torch.float64), train(plain, torch.float64), rtol=1e-9, atol=0)


def test_the_trained_weights_are_interchangeable() -> None:
    fused = small_vit()
    swap(fused)
    train(fused)
    plain = small_vit(seed=1)
    plain.load_state_dict(fused.state_dict(), strict=True)
    images, labels = digits()
    with torch.no_grad():
        predicted, expected = plain.eval()(images).argmax(-1), fused.eval()(images).argmax(-1)
    assert (predicted == expected).float().mean() > 0.999
    assert (predicted == labels).float().mean() > 0.5
