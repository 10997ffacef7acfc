"""The only clock, and what it records; tasks with durations, no transformers."""
