"""``python -m flaxdet``: the command line."""

import sys

from flaxdet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
