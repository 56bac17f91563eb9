"""What `sample.cu` is told of a batch: a job for every row, and one for every row that reports."""

import numpy as np

# Structures of `sample.cu`.
JOB = np.dtype(
    [(name, np.float64) for name in ("temperature", "log_min_p", "top_p")]
    + [("top_k", np.int64), ("seed", np.uint64), ("stream", np.uint64), ("position", np.uint32)]
    + [(name, np.int32) for name in ("row", "noisy", "wanted", "copy")]
    + [(name, np.int32) for name in ("seen_at", "n_seen", "banned_at", "n_banned")]
    + [(name, np.float32) for name in ("repetition", "frequency", "presence")]
)
FOUND = np.dtype(
    [("score", np.float64), ("least", np.uint64), ("token", np.int64)]
    + [("ticket", np.int32), ("raw", np.float32)]
)
SETTLED = np.dtype(
    [("top", np.float64), ("total", np.uint64), ("token", np.int64)]
    + [(name, np.int32) for name in ("job", "wanted", "weighs", "draws", "count", "ticket", "done")]
    + [("raw", np.float32)]
)
DRAW = np.dtype(
    [("floor", np.uint64), ("total", np.uint64), ("token", np.int64)]
    + [("job", np.int32), ("done", np.int32), ("raw", np.float32), ("unused", np.int32)]
)

_COPIED = "temperature log_min_p top_p top_k seed position repetition frequency presence".split()
_STREAM = np.uint64(0x9E3779B97F4A7C15)  # between the samples of a request


def jobs(rows, asked):
    """Jobs of R rows, and behind them of the rows `asked`, of which raw logits are reported.

    Returns
    -------
    jobs : (R + len(asked),) JOB; `wanted` is left 0
    seen, counts : tokens of the histories and how often each was generated, int32, row after row
    banned : tokens that may not be chosen, int32, row after row
    """
    R = len(rows)
    result = np.zeros(R + len(asked), JOB)
    result["row"][:R], result["row"][R:] = np.arange(R), asked
    result["temperature"][R:], result["log_min_p"][R:], result["copy"] = 1, -np.inf, -1
    own = result[:R]
    for name in _COPIED:
        own[name] = getattr(rows, name)
    own["stream"] = rows.key + rows.sample * _STREAM
    own["noisy"] = rows.drawn & ~rows.filtered

    # Rows that are penalised need a copy of their logits.
    seen = [h for h in rows.history or () if h is not None]
    at = [r for r, h in enumerate(rows.history or ()) if h is not None]
    own["seen_at"][at], own["n_seen"][at] = _places(h.ids for h in seen)
    banned = rows.banned or ()
    own["banned_at"][: len(banned)], own["n_banned"][: len(banned)] = _places(banned)
    changed = np.flatnonzero(own["n_seen"] + own["n_banned"])
    own["copy"][changed] = np.arange(len(changed))
    return result, _flat(h.ids for h in seen), _flat(h.counts for h in seen), _flat(banned)


def _places(items):
    """Where every item's tokens begin in the run of all, and how many they are."""
    sizes = np.array([len(x) for x in items], np.int32)
    return np.cumsum(sizes) - sizes, sizes


def _flat(items):
    return np.concatenate([np.empty(0, np.int32), *(np.asarray(x, np.int32) for x in items)])
