"""SHA-256 of files and tensors, and the bytes of a tensor."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes, (number of bytes,) uint8, on its device."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor in host memory."""
    return hashlib.sha256(tensor_bytes(tensor).numpy()).hexdigest()
