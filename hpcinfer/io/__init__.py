"""The only floor that opens files: weights, metadata, input lines and results.

    checkpoint   one interface to a model on disk: `open_checkpoint`
    safetensors  Hugging Face directories (config.json, *.safetensors, index)
    hdf5         converted models (.h5): layout, opening, writing, checksums
    metadata     config, tokenizer and chat template of a model
    convert      Hugging Face directory -> .h5
    inspect      what is in a model or results file, as text
    lines        input files line by line in bounded memory
    jsonl        lines of output that survive a killed job
    state        what is kept of an unfinished run, and the lock on its output
    results      what `generate` and `score` write: JSONL or HDF5
    activations  what `extract` writes: the file that joins the parts of all ranks, and its reader
    parts        files of one rank, to which activations are written as they are made
    atomic       a file appears whole under its name or not at all

Nothing is imported here, so that h5py is loaded only where a file needs it.
"""
