"""Sample texts from a model or a server."""
