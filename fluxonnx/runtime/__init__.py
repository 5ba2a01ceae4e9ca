"""The runtime: graphs in, pictures out."""
