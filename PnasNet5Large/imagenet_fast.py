#!/usr/bin/env python3
"""The entry point's name in the seed of this bundle; the same as main.py."""

import sys

from main import errors, main

if __name__ == "__main__":
    sys.exit(errors.run(main))
