#!/usr/bin/env bash
# The demo: the shipped model answers the shipped prompts, tensor-parallel over two ranks.
#
#   run      bash jobs/demo.sh           on any Linux machine with Python 3.11; no MPI, no root
#   runs     mpirun -n 2 hpcinfer generate data/model --input data/prompts.jsonl
#                --output results/demo.h5 --output results/demo.jsonl --layout tp=2 --show
#   cost     the first time about a minute for the packages, then seconds
#   result   results/demo.h5 and results/demo.jsonl
#
# HPCINFER_RANKS=...     ranks to run on (default 2); jobs/environment.sh lists the other settings
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh
ranks=${HPCINFER_RANKS:-2}

# Generate
mkdir -p results
launch "$ranks" hpcinfer generate data/model --input data/prompts.jsonl \
    --output results/demo.h5 --output results/demo.jsonl --layout "tp=$ranks" --show \
    --overwrite </dev/null

# Say where the results are and how to read them
cat <<'END'

Results: results/demo.jsonl (one OpenAI Batch record per line) and results/demo.h5, read with h5py:

    import h5py
    with h5py.File("results/demo.h5") as f:
        ids, text, first = f["custom_id"].asstr()[:], f["text"].asstr()[:], f["choice_offsets"][:]
        for i, name in enumerate(ids):
            print(name, *text[first[i] : first[i + 1]])
END
