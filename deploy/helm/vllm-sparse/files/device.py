"""Start-up check: the pod has the devices that sparse attention runs on. Usage: device.py COUNT PLACE_IN_VALUES

Ends with a message otherwise, which `kubectl describe pod` shows: minutes before a server would have loaded.
"""

import sys
from pathlib import Path

# Compute capability from which the plugin has kernels. Importing it would import vLLM.
LEAST_CAPABILITY = (8, 0)
TERMINATION_LOG = Path("/dev/termination-log")


def problem(devices: list[tuple[str, tuple[int, int]]], count: int, place: str) -> str | None:
    """What is wrong with devices (name and compute capability), None if nothing is."""
    if len(devices) < count:
        return (
            f"{place}.accelerator.count is {count}, and this pod sees {len(devices)} NVIDIA GPUs. Check the node's "
            f"driver and {place}.runtimeClassName."
        )
    for index, (name, capability) in enumerate(devices):
        if capability < LEAST_CAPABILITY:
            return (
                f"GPU {index} is {name}, compute capability {capability[0]}.{capability[1]}: sparse attention runs on "
                f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} and newer, best on Hopper (H100, H200, GH200). Choose "
                f"such nodes by {place}.nodeSelector, for instance by their label nvidia.com/gpu.product."
            )
    return None


def main() -> None:
    import torch

    indices = range(torch.cuda.device_count())
    devices = [(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)) for index in indices]
    message = problem(devices, int(sys.argv[1]), sys.argv[2])
    if message:
        if TERMINATION_LOG.exists():
            TERMINATION_LOG.write_text(message)
        sys.exit(message)
    print(", ".join(name for name, _ in devices))


if __name__ == "__main__":
    main()
