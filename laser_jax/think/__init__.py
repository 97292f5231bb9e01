"""What a query's latent steps hold, as text, page and server."""
