"""The loop that the models that ship are trained in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

SEED, BATCH = 7, 64


def train(
    model: Any,
    count: int,
    epochs: int,
    rate: float,
    data: Callable[[int, np.ndarray], tuple[Any, ...]],
    loss_of: Callable[..., Any],
) -> None:
    """AdamW with a one-cycle schedule, whole batches in a new order every epoch.

    Args:
        model: In place.
        count: Of samples.
        epochs: How often each is seen.
        rate: The highest learning rate.
        data: Of the number of an epoch and the order of its samples; tensors in that order.
        loss_of: Of a batch of each of these tensors.
    """
    import torch

    steps, start = epochs * (count // BATCH), time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    rng = np.random.default_rng(SEED)
    model.train()
    for epoch in range(epochs):
        order = rng.permutation(count)[: count // BATCH * BATCH]
        total = 0.0
        for batch in zip(*(part.split(BATCH) for part in data(epoch, order)), strict=True):
            loss = loss_of(*batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        mean, took = total * BATCH / len(order), time.monotonic() - start
        print(f"epoch {epoch + 1}: loss {mean:.4f}, {took:.0f} s", flush=True)
    model.eval()
