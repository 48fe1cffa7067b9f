"""Floating-point arithmetic by name: what weights are summed in, what the model computes in, and TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from distsurf.errors import InputError


@dataclass(frozen=True)
class Precision:
    """``sums``: dtype of θ0 + Σ c_k d_k and of the data; ``compute``: of the model's weights and activations."""

    sums: torch.dtype
    compute: torch.dtype
    tf32: bool = False

    @property
    def is_reduced(self) -> bool:
        """Whether it is less than strict float32."""
        return self.tf32 or self.compute not in (torch.float32, torch.float64)


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "fp64": Precision(torch.float64, torch.float64),
    "tf32": Precision(torch.float32, torch.float32, tf32=True),
    "bf16": Precision(torch.float32, torch.bfloat16),
    "fp16": Precision(torch.float32, torch.float16),
}
"""``fp32`` is strict: TF32 is off in matmul and in cuDNN, where torch leaves it on."""


def require_available(name: str, device: torch.device) -> None:
    """Raise InputError where a device has no such arithmetic."""
    if PRECISIONS[name].tf32 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise InputError(
            f"run.precision = {name!r} needs an NVIDIA GPU of the Ampere generation or newer, and this rank computes "
            f"on {device}; use fp32 or bf16"
        )


@contextmanager
def arithmetic(precision: Precision) -> Iterator[None]:
    """TF32 as asked for, and no choice of algorithm by timing, which would let digits differ between ranks."""
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    torch.set_float32_matmul_precision("high" if precision.tf32 else "highest")
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = precision.tf32, False, True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before[1:]
