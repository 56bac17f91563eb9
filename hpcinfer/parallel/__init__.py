"""The parallel strategies, one per file: local arrays and one communicator in, local arrays out."""
