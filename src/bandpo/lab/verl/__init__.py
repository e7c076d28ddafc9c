"""verl as a backend of the lab: a recipe as its command line, and its training as a run."""
