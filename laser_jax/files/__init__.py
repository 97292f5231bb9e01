"""Files: written whole, read by one rule, locked."""
