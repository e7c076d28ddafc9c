"""A study: arms by settings by seeds over one recipe, each a run; what they left, and what it says."""
