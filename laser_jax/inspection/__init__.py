"""Looking inside a model: what a query's latent steps hold, as data, as a page and as a server."""
