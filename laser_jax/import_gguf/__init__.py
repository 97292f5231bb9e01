"""A llama.cpp file to a Hugging Face directory."""
