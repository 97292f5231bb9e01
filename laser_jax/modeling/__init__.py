"""The backbone: one Flax Linen decoder for Qwen3 and Llama 3.x."""
