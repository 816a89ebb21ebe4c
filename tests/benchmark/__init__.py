"""Speed, against the peers: python -m tests.benchmark. See README.md here."""

from common.transforms import import_torchvision

import_torchvision()  # before timm, which imports it without our help
