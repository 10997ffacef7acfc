"""Traces for other programs to read; no pictures."""
