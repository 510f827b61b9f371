"""``python -m art_denoised``: the command line."""

import sys

from art_denoised.cli import main

sys.exit(main())
