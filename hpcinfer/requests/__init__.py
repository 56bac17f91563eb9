"""What a run is asked for and what it answers: input lines to requests, results to output lines."""
