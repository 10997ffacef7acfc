"""What happened, in figures and tables; nothing is simulated here."""
