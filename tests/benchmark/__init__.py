"""Speed, against the peers: python -m tests.benchmark. See README.md here."""

from common import input

input.import_torchvision()  # before timm, which imports it without our help
