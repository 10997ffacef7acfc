"""Reads the commands that a bash script would run, without running any."""
