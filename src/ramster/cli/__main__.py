"""`python -m ramster.cli`: the command line without its entry script."""

import sys

from ramster.cli import main

if __name__ == "__main__":
    sys.exit(main())
