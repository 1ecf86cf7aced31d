"""Kinds of GPU that may be rented, with the peak figures that their maker publishes: plain data, needed without torch."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: for people.
        bfloat16: FLOPs per second of dense products of matrices in half precision, without sparsity.
        float32: the same in full precision, outside of tensor cores, as torch multiplies unless it is told otherwise.
        float64: the same in double precision, outside of tensor cores.
        bandwidth: bytes per second from and to its memory.
        memory: bytes that programs find on it, in whole GiB.
        link: bytes per second to another GPU of the same machine, each way.
    """

    name: str
    bfloat16: float
    float32: float
    float64: float
    bandwidth: float
    memory: int
    link: float


# Source: NVIDIA's data sheets; of those with NVLink, the SXM modules, else PCIe 4.0 with 16 lanes.
GPUS = {
    "a100-40": Gpu("A100 40 GB", 312e12, 19.5e12, 9.7e12, 1555e9, 39 * GIB, 300e9),
    "a100-80": Gpu("A100 80 GB", 312e12, 19.5e12, 9.7e12, 2039e9, 79 * GIB, 300e9),
    "h100": Gpu("H100 80 GB", 989e12, 67e12, 34e12, 3350e9, 79 * GIB, 450e9),
    "h200": Gpu("H200 141 GB", 989e12, 67e12, 34e12, 4800e9, 139 * GIB, 450e9),
    "b200": Gpu("B200 180 GB", 2250e12, 75e12, 37e12, 8000e9, 178 * GIB, 900e9),
    "l40s": Gpu("L40S 48 GB", 362e12, 91.6e12, 1.4e12, 864e9, 44 * GIB, 32e9),
    "rtx-4090": Gpu("RTX 4090 24 GB", 165e12, 82.6e12, 1.3e12, 1008e9, 23 * GIB, 32e9),
}
# What is taken to be reached of a peak figure, unless told otherwise.
EFFICIENCY = 0.4
