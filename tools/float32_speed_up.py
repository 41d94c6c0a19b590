"""Prints how many times as fast as bfloat16 this CPU multiplies float32.

Measured rather than read from a list of CPU flags: without instructions for bfloat16, libraries emulate it at anything
between half and a hundredth of the speed. Needs torch, so it runs in the environment.
"""

import time

import torch

# Small products, many times, on one thread: the quickest of them is not disturbed, however busy the machine is.
SIZE = 256
ROUNDS = 20


def product_seconds(matrix: torch.Tensor) -> float:
    """Time of one product."""
    started = time.perf_counter()
    torch.matmul(matrix, matrix)
    return time.perf_counter() - started


def float32_speed_up() -> float:
    """Time of bfloat16 over time of float32, each the quickest of `ROUNDS` that take turns."""
    torch.set_num_threads(1)
    wide = torch.rand(SIZE, SIZE)
    narrow = wide.to(torch.bfloat16)
    rounds = [(product_seconds(narrow), product_seconds(wide)) for _ in range(ROUNDS)]
    return min(of_narrow for of_narrow, _ in rounds) / min(of_wide for _, of_wide in rounds)


if __name__ == "__main__":
    print(float32_speed_up())
