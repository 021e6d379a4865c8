"""The optimizer that both base models are trained with."""

import numpy as np
import torch


def descent(parameters: list[torch.nn.Parameter], steps: int, lr: float):
    """AdamW with a warm-up of 50 steps and a cosine; gradients clipped to a norm of 1. -> a function: loss -> a step
    down it."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * step / max(1, steps)))
    )

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    return step
