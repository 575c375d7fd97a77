"""Published figures of accelerators, by the kind of a jax device: memory, products of matrices, main memory and networks.

Rates of memory and networks: Austin et al. 2025, How to scale your model, chapter 2, "TPU specs" (jax-ml.github.io/scaling-book/tpus), as
read in December 2026. A device is a chip, but of v2, v3 and TPU7x one of its two cores.
"""

from typing import NamedTuple

# Bytes of memory of a device, for devices that are not at hand; cloud.google.com/tpu/docs/system-architecture-tpu-vm.
MEMORY = {
    "TPU v2": 8 << 30, "TPU v3": 16 << 30, "TPU v4": 32 << 30, "TPU v5 lite": 16 << 30, "TPU v5": 95 << 30, "TPU v5p": 95 << 30,
    "TPU v6 lite": 32 << 30, "TPU7x": 96 << 30,
}  # fmt: skip
PEAKS = {  # part of jax's device_kind -> dense bfloat16 TFLOP/s of a device, from the maker's data sheets; the first that fits counts
    "TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5": 459, "TPU v6 lite": 918, "TPU v6e": 918,
    "A100": 312, "H100": 989, "H200": 989,
}  # fmt: skip


class Rates(NamedTuple):
    """Bytes per second of a chip."""

    memory: float  # of its main memory, HBM
    link: float  # of a link to a neighbour, ICI, in one direction
    network: float  # its share of its host's network, DCN


RATES = {
    "TPU v4": Rates(1.2e12, 4.5e10, 6.25e9),
    "TPU v5 lite": Rates(8.2e11, 4.5e10, 3.125e9),
    "TPU v5": Rates(2.8e12, 9e10, 6.25e9),
    "TPU v6 lite": Rates(1.6e12, 9e10, 12.5e9),
}


def peak(kind: str) -> float | None:
    """The FLOP/s of a kind of device in bfloat16; None for a kind that is not in the table."""
    return next((1e12 * rate for name, rate in PEAKS.items() if name in kind), None)
