"""From tokens and a clip to a loss and what the clip did."""
