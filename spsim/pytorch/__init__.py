"""Real PyTorch: modules that are traced, layers that run, profiles that are read; no measuring."""
