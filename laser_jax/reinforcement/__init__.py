"""Thoughts that are drawn, rewarded and reinforced: `objective.method: latent_rl`."""
