"""What each library runs: a module per library, named like it."""
