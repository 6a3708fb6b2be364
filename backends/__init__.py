"""Writers and loaders of what deployment runtimes read."""
