"""`python -m self_rewarding_lm`: the command, also for `accelerate launch -m self_rewarding_lm`."""

import sys

from self_rewarding_lm.cli import main

if __name__ == "__main__":
    sys.exit(main())
