"""Scenarios in the options of training libraries, both ways: `reading` and `emission`, a module for each library."""
