"""The command line: one file per subcommand; argument parsing and nothing else."""
