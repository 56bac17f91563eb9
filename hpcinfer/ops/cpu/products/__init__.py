"""Matrix products on processors: own code, oneDNN, quantised weights."""
