"""``squared_relu`` and ``sigmoid_gate`` in plain PyTorch: their specification, and what runs where
no kernel does."""

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_relu(x: Tensor) -> Tensor:
    x = F.relu(x)
    return x * x  # torch.square is one of the functions that autocast runs in fp32


def sigmoid_gate(x: Tensor, other: Tensor) -> Tensor:
    return torch.sigmoid(x) * other
