"""Calibration: from timings of real operators and collectives to the coefficients of a profile."""
