"""The graph of a model: reading it, cutting an experiment copy of it, and patching the original bytes."""
