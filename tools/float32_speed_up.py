"""Prints how many times as fast as bfloat16 this CPU multiplies float32.

Measured rather than read from a list of CPU flags: without instructions for bfloat16, libraries emulate it at anything
between half and a hundredth of the speed. Needs torch, so it runs in the environment.
"""

import time

import torch

SIZE = 512
TIMES = 3


def seconds(dtype: torch.dtype) -> float:
    """The quickest of a few products of square matrices."""
    matrix = torch.rand(SIZE, SIZE).to(dtype)
    torch.matmul(matrix, matrix)
    taken = []
    for _ in range(TIMES):
        started = time.perf_counter()
        torch.matmul(matrix, matrix)
        taken.append(time.perf_counter() - started)
    return min(taken)


def float32_speed_up() -> float:
    """Time of bfloat16 over time of float32."""
    return seconds(torch.bfloat16) / seconds(torch.float32)


if __name__ == "__main__":
    print(float32_speed_up())
