"""What methods of both phases have in common: a name, and knobs of a server and of its requests."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar


class Method(ABC):
    """A sparse method of one phase: a frozen dataclass whose fields are its knobs."""

    name: ClassVar[str]
    """As requests say it; a prefill and a decode method may have the same."""
    enabled_by_default: ClassVar[bool] = True
    """Requests may choose it where the server's configuration does not list `methods`."""
    server_knobs: ClassVar[tuple[str, ...]] = ()
    """Knobs that the server's configuration may set and a request may not."""
    former_names: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Present name of each knob that was renamed, by the former one, which is accepted for one release."""

    @property
    def fingerprint(self) -> str:
        """What the choice depends on beside the knobs, such as a file's content; cached blocks are kept apart by it."""
        return ""

    @property
    def weighs_masses(self) -> bool:
        """The choice weighs attention masses, not the order of scores alone, so a soft cap on logits would change it.

        Sinks change no choice: shares are of the mass that a head gives to keys.
        """
        return False

    @classmethod
    def knobs_of_files(cls, knobs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Knobs that files named by other knobs hold; they count where a knob is not given.

        Args:
            knobs: as given, not checked.
        """
        return {}

    def check_defaults(self, num_layers: int, num_query_heads: int) -> None:  # noqa: B027
        """Check knobs as the server's configuration sets them: against the model and against one another.

        Args:
            num_layers: attention layers of the model.
            num_query_heads: query heads of the whole model.

        Raises:
            KnobError: a knob does not go with the model, or would never count.
        """
