#!/usr/bin/env python3
"""The entry point's name in the seed of this bundle; the same as main.py."""

from main import errors, main

if __name__ == "__main__":
    errors.run_and_exit(main)
