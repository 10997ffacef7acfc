"""Seconds and bytes from a hardware profile; no order of events."""
