"""`python -m sface_kernels`: the command `sface-kernels`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
