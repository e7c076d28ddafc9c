"""What a clip does, beyond the loss: whole distributions, matched radii."""
