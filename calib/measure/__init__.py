"""How far two models are apart: the torch reference of an artifact, floors, perplexity."""
