"""A run: from an experiment's config to its loop."""
