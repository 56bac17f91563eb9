"""The only floor that opens files: weights, metadata, input lines and results.

    models       a model of whichever kind: `open_checkpoint`
    checkpoint   what both kinds are once they are open: tensors by name, read in parts
    safetensors  Hugging Face directories (config.json, *.safetensors, index)
    hdf5         converted models (.h5): layout, opening, writing, checksums
    metadata     config, tokenizer and chat template of a model
    integrity    reading every weight, to see whether it is sound
    convert      Hugging Face directory -> .h5
    inspect      what is in a model or results file, as text
    lines        input files line by line in bounded memory
    jsonl        lines of output that survive a killed job
    state        what is kept of an unfinished run, and the lock on its output
    kv           pages of the key/value cache, kept with the state
    results      what `generate` and `score` write: JSONL or HDF5
    columns      the datasets of results in HDF5
    activations  what `extract` writes: the file that joins the parts of all ranks, and its reader
    parts        files of one rank, to which activations are written as they are made
    read_parts   what such a file holds so far, and whether it is sound
    rows         reports: tables to print, and JSON
    trace        the ledger's calls as a timeline
    bounds       how much memory reading metadata may take
    atomic       a file appears whole under its name or not at all

Nothing is imported here, so that h5py is loaded only where a file needs it.
"""
