"""What `bandpo verl` runs: a recipe as verl's command line, and verl's run as a folder of ours (needs verl)."""

LOSS_MODE = "bandpo"  # the loss's name in verl, and its configuration's place
TARGET = "bandpo.engines.verl.BandLossConfig"
