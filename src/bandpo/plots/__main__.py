"""``python -m bandpo.plots FILE.svg`` draws the picture of the README."""

import sys

from bandpo.plots import main

sys.exit(main())
