"""Key adapters against what vLLM's own code wrote."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.oracle import PACKED, PLAIN, Platform


@pytest.mark.parametrize("platform", PACKED)
@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128, 256])
@pytest.mark.parametrize("head_size", [32, 64, 80])
def test_keys_are_read_as_written(
    platform: Platform, block_size: int, head_size: int, generator: torch.Generator
) -> None:
    """Bit for bit, for any range, on permuted blocks, beside other requests."""
    if not platform.allows(block_size, head_size):
        pytest.skip("vLLM does not use this packing for these sizes")
    contexts = [1, 127, 129, 1000]
    data = oracle.random_paged(platform, generator, contexts, 3, head_size, block_size)
    for request, context in enumerate(contexts):
        reader = data.reader(request)
        ranges = [(0, context), (context - 1, context), (0, 1), (context // 3, context // 2 + 1)]
        ranges += [(block_size, context)] if context > block_size else []
        for start, stop in ranges:
            read = reader.read(start, stop)
            assert read.dtype == platform.dtype
            assert torch.equal(read, data.keys[request][:, start:stop]), f"{start} to {stop} of {context}"
        scattered = torch.randint(context, (3, 50), generator=generator).to(platform.device)
        gathered = reader.gather(scattered)
        assert gathered.dtype == platform.dtype
        expected = data.keys[request].gather(1, scattered.unsqueeze(2).expand(-1, -1, head_size))
        assert torch.equal(gathered, expected), f"single keys of {context}"


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 3), (4, 3), (0, 101), (100, 101)])
def test_ranges_outside_the_context_are_refused(start: int, stop: int, generator: torch.Generator) -> None:
    reader = oracle.random_paged(PLAIN, generator, [100], 1, 16, 16).reader(0)
    with pytest.raises(ValueError, match=rf"{start} to {stop} asked for, the context holds 0 to 100"):
        reader.read(start, stop)
