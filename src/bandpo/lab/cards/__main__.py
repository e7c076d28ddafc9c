"""``python -m bandpo.lab.cards docs`` writes every card, and with ``--pictures`` draws them as well."""

from __future__ import annotations

import argparse
from pathlib import Path

from bandpo.lab.cards.write import write_pictures, write_texts

parser = argparse.ArgumentParser(prog="python -m bandpo.lab.cards", description=__doc__)
parser.add_argument("docs", type=Path, help="the folder of the docs")
parser.add_argument("--pictures", action="store_true", help="draw them too: a minute or two")
args = parser.parse_args()
files = write_texts(args.docs) + (write_pictures(args.docs) if args.pictures else [])
print(f"{len(files)} files in {args.docs}")
