"""Speed against torchvision and timm, measured in turns in one process each: python -m tests.benchmark --help"""
