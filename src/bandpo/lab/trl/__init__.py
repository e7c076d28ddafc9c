"""TRL as a backend of the lab: a recipe as its configuration, and its training as a run."""
