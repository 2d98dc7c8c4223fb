"""What reproduces a published effect: one command, one table, one figure each."""
