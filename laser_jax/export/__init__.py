"""A trained model as others load it: sentence-transformers, Hugging Face, StableHLO."""
