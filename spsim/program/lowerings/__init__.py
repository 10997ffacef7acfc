"""One redistribution and one operator become several instructions, program to program; no rules."""
