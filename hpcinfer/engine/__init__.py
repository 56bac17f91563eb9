"""The engine decides: requests and their text, scheduling, sampling, and what a run writes."""
