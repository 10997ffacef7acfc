"""From blocks to what each rank does in a step: segments, their order of issue, the walk over them; no figures."""
