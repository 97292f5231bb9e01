"""Runs and models scored: BEIR, BRIGHT, mteb, comparisons."""
