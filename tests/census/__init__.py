"""Every decoder of the installed transformers, tiny, through the graph and against transformers."""
