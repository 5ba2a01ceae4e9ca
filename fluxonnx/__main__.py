"""`python -m fluxonnx`."""

import sys

from fluxonnx.cli import main

sys.exit(main())
