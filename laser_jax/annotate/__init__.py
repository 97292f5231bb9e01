"""Reasoning for training rows that lack it, from an OpenAI-compatible endpoint."""
