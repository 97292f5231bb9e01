"""Models that have a name of their own."""
