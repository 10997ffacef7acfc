"""The ranks of a run on real devices. Torch is loaded by the functions that ask it, not by the import."""
