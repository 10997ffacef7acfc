"""Traces that torch.profiler wrote (Kineto, in Chrome's Trace Event Format) of a run of the user's own."""

from spsim.pytorch.kineto.loader import align, load_kineto_trace, read_spans

__all__ = ["align", "load_kineto_trace", "read_spans"]
