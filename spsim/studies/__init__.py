"""Questions over many results: explain, compare, validate, sweep; no pictures."""
