"""Serves vectors and search over HTTP, as OpenAI's clients ask for them."""
