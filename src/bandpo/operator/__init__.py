"""Old log-probabilities, a divergence and a radius -> an interval of ratios for each token."""
