"""Activations of given texts: what is selected, taken from the model, and written."""
