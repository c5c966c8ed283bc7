"""`python -m evaat_fast` is the command `evaat-fast`."""

import sys

from evaat_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
