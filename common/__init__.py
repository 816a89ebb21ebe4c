"""What the five bundles share: devices and ranks, feeding the device, checkpoints, log lines, the launcher."""
