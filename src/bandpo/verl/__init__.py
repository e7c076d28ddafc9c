"""What `bandpo verl` runs: a recipe as verl's command line, and verl's run as a folder of ours (needs verl)."""
