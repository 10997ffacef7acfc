"""Traces for other programs to read: for Perfetto, and as torch.profiler writes them; no pictures."""
