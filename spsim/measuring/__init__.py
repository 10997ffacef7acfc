"""Calibration and verification on the devices at hand, and the processes that they run in."""
