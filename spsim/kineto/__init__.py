"""Traces that torch.profiler wrote (Kineto, in Chrome's Trace Event Format) of a run of the user's own."""

from spsim.kineto.loader import load_kineto_trace

__all__ = ["load_kineto_trace"]
