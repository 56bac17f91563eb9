"""How kernels are compiled, launched, captured and replayed; the libraries beside them."""
