"""One rank's mathematics, without MPI: plain array code, the oracle for the fast versions."""
