"""The blocks of a model, written once as operators with named dimensions; no plan."""
