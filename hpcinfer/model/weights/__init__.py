"""The weights of a model: which there are, how they are checked, loaded, shared and placed."""
