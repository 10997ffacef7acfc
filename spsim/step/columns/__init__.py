"""A step for many workloads at once: where the order of events does not depend on durations, times are arrays."""
