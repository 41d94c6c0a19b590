"""Maps as small PNG pictures, one pixel a cell."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image

from vllm_sparse.inspect.kept import KeptMap

Colour = tuple[int, int, int]

FUTURE: Colour = (236, 236, 236)
WHITE: Colour = (255, 255, 255)
# From the least attention that has a colour of its own to all of it.
KEPT_SHADES: tuple[Colour, Colour] = ((190, 215, 238), (8, 48, 107))
MISSED_SHADES: tuple[Colour, Colour] = (WHITE, (217, 72, 1))
KEPT_WITHOUT_MASS: Colour = (66, 130, 190)
# Share of a query's attention that gets the lightest shade, on a logarithmic scale to 1.
LEAST_SHARE = 1e-4


def shade(mass: torch.Tensor, shades: tuple[Colour, Colour]) -> torch.Tensor:
    """Colours of shares of attention: ``[..., 3]``, 0 to 255."""
    depth = 1 - mass.clamp(min=LEAST_SHARE, max=1).log10() / torch.tensor(LEAST_SHARE).log10()
    light, dark = (torch.tensor(colour, dtype=torch.float32) for colour in shades)
    return light + depth.unsqueeze(-1) * (dark - light)


def kept_picture(kept: KeptMap) -> torch.Tensor:
    """Blue what was read, orange what was missed, darker with more attention: uint8 ``[rows, columns, 3]``."""
    in_reach = ~kept.share.isnan()
    share = kept.share.nan_to_num().unsqueeze(-1)
    if kept.kept_mass is None or kept.missed_mass is None:
        read = torch.tensor(KEPT_WITHOUT_MASS).expand(*kept.share.shape, 3)
        missed = torch.tensor(WHITE).expand_as(read)
    else:
        read, missed = shade(kept.kept_mass, KEPT_SHADES), shade(kept.missed_mass, MISSED_SHADES)
    pixels = torch.where(in_reach.unsqueeze(-1), share * read + (1 - share) * missed, torch.tensor(FUTURE))
    return pixels.round().to(torch.uint8)


def data_url(pixels: torch.Tensor) -> str:
    """A PNG within the page: of uint8 ``[rows, columns, 3]``."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy(), "RGB").save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
