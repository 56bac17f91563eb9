"""How compiled functions are made, launched, captured and replayed on a processor."""
