"""The backbone: one Flax Linen decoder for Qwen3, Qwen2.5, Llama 3.x and Mistral."""
