"""Clip cards: what each clip is, does and comes from. ``python -m bandpo.lab.cards docs`` writes them."""

from bandpo.lab.cards.about import About as About
from bandpo.lab.cards.about import about as about
