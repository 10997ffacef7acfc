"""A module for each command, in which `command` is what it does: its parameters are the options."""
