"""Real words, names and numbers that planted facts are made of."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

_ADJECTIVES = """
amber ancient blue brave bright broken calm clever copper crimson curious distant dusty eager early empty faded
fragile gentle golden green hidden hollow honest humble icy ivory jolly kind lonely loud lucky marble mellow
misty narrow nimble noble olive pale patient plain polite proud purple quick quiet rapid rare royal rusty scarlet
secret sharp shiny silent silver simple sleepy slow small smooth solid steady stormy sturdy sunny sweet swift
tall tender tidy tiny velvet violet warm wild wise wooden yellow young
"""
_NOUNS = """
acorn anchor apple arrow badger barrel basket beacon bell blanket bottle bridge broom bucket butter button cabin
camel candle canoe carpet castle cherry chimney clock cloud coin compass cottage cradle crown curtain desert
dolphin dragon drum eagle engine falcon feather fence ferry fiddle flag flute forest fountain fox garden gate
glacier glove goat guitar hammer harbor harvest helmet honey island jacket jewel kettle key kite ladder lake
lantern lemon library lion lizard meadow medal mill mirror monkey mountain needle oak ocean onion orchard otter
oven owl paddle palace parrot pebble pencil piano pigeon pillow planet pond pony potato pumpkin rabbit raven
ribbon river robin rocket rope saddle sailor salmon scarf shadow ship shovel spider spoon spring squirrel stable
statue stone sugar table temple thunder ticket tiger tower trumpet tunnel turtle umbrella valley violin wagon
walnut whale whistle willow window winter wolf
"""
_FIRST_NAMES = """
Alice Anton Boris Carla Clara David Diana Elena Emil Fiona Greta Hanna Hugo Irene Jonas Julia Karin Lena Linus
Maria Martin Nadia Nora Oscar Paula Peter Rosa Simon Sofia Thomas Ursula Victor Wanda Yusuf
"""
_LAST_NAMES = """
Adler Baker Becker Carver Cooper Draper Fischer Fletcher Foster Gardner Graves Harper Hunter Keller Lambert
Marsh Mason Miller Moreau Novak Palmer Parker Porter Rossi Sawyer Shepherd Stone Taylor Turner Vogel Walker
Weaver Winter Wright
"""


ADJECTIVES, NOUNS, FIRST_NAMES, LAST_NAMES = (
    tuple(text.split()) for text in (_ADJECTIVES, _NOUNS, _FIRST_NAMES, _LAST_NAMES)
)


class Words:
    """Words, names and numbers of one document, each given once.

    Attributes:
        given: all so far.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self.given: set[str] = set()

    def _fresh(self, *lists: Sequence[str], between: str = " ") -> str:
        while True:
            found = between.join(self._rng.choice(words) for words in lists)
            if found not in self.given:
                self.given.add(found)
                return found

    def key(self) -> str:
        """Such as ``amber lantern``."""
        return self._fresh(ADJECTIVES, NOUNS)

    def variable(self) -> str:
        """Such as ``amber_lantern``."""
        return self._fresh(ADJECTIVES, NOUNS, between="_")

    def word(self) -> str:
        """Such as ``lantern``."""
        return self._fresh(NOUNS)

    def person(self) -> str:
        """Such as ``Clara Weaver``."""
        return self._fresh(FIRST_NAMES, LAST_NAMES)

    def number(self) -> str:
        """Five digits: long enough never to be guessed, short enough for small models to repeat."""
        return self._fresh("123456789", *["0123456789"] * 4, between="")
