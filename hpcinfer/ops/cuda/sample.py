"""Choice of the next tokens of a batch in one pass over the logits, or two.

Every step copies one board to the device: how each row is chosen from, the tokens that it has seen,
and room for what the kernels find, which comes back in one copy. Rows that are greedy or drawn
without a filter need one launch. Filtered rows and reports need a second one; it draws too where
this rank has the whole vocabulary, and otherwise waits until the ranks know the largest logits.
"""

import numpy as np

from hpcinfer import array
from hpcinfer.ops.candidates import keys_of, pack
from hpcinfer.ops.cuda.jobs import DRAW, FOUND, SETTLED, jobs
from hpcinfer.ops.cuda.runtime.board import Board
from hpcinfer.ops.cuda.runtime.launch import NAMES, launch

OPTIONS = ((),)
KERNELS = ("scan", "settle", "draw", "largest")

# Threads of a block that has a slice of a row, and of one that has a row; slices of a row at most.
_THREADS, _ROW_THREADS, _SLICES = 256, 512, 64

# Candidates from which a rank draws that has the whole vocabulary, room for those that `settle`
# gathers of a row, and most probable tokens that it puts out.
_DRAWN_FROM, _ROOM, _REPORTED = 256, 2048, 64


def columns(logits, start, V, rows, width, between=None):
    """As `ops.sample.columns`."""
    R, n = logits.shape
    if logits.dtype.name not in NAMES or not (0 < R < 2**15 and 0 < n and 0 < V < 2**31):
        return NotImplemented
    raw = array.namespace(logits).ascontiguousarray(array.widen(logits))
    return _DeviceColumns(raw, int(start), int(V), rows, min(width, n), between)


class _DeviceColumns:
    """As `ops.sample.Columns`, of at least one row and column.

    Attributes
    ----------
    alone : whether this rank has the whole vocabulary, and draws by itself
    jobs : (R + L,) JOB on the host; the L rows `asked` report
    places : (R + L,) number of a job among those that need a second pass
    found : (R + L,) FOUND, of the first pass
    settled, keys : SETTLED and keys of the second pass; None before it
    tokens, values : (R,) every row's token so far, and its raw logit
    """

    def __init__(self, raw, start, V, rows, width, between):
        self.raw, self.start, self.V, self.rows, self.width = raw, start, V, rows, width
        (R, self.n), self.alone = raw.shape, raw.shape[1] == V > 1
        self.asked = np.flatnonzero(rows.logprobs >= 0)
        self.reported = min(rows.reported(V), self.n)

        # Slices of a row, each of whole rounds of its block's threads.
        self.span = -(-self.n // (_SLICES * _THREADS)) * _THREADS
        self.slices = -(-self.n // self.span)
        self.jobs, *tokens = jobs(rows, self.asked)
        self._decide()
        self._find(tokens, between)
        self.tokens, self.values = (self.found[name][:R].copy() for name in ("token", "raw"))
        if self.alone:
            self._take_drawn()

    # ---- answers ----

    def best(self):
        R = len(self.rows)
        return self.found["score"][:R], self.found["token"][:R]

    def nucleus_totals(self, index, top):
        self._settle_below(top)
        return self.settled["total"][self.places[index]].astype(np.int64)

    def candidates(self, index, width):
        """As the plain form; zeros where no other rank needs them."""
        width = min(width, self.n)
        if self.alone:
            return np.zeros((len(index), width), np.uint64)
        if width > self.width:
            return self._largest(index, width)
        self._settle_below(self.found["score"])
        return self._put_out(index, width)

    def draw(self, index, keys, floor, total):
        if self.alone:
            return self.tokens[index], np.ones(len(index), bool)
        return self._draw(index, floor, total, keys)

    def report(self, index, token_ids, n):
        """As the plain form, for the rows `asked`, and `reported` most probable tokens at most."""
        self._settle_below(self.found["score"])
        number, n = len(self.rows) + np.arange(len(index)), min(n, self.n)
        keys = self._put_out(number, n) if n <= _REPORTED else self._largest(number, n)

        # The raw logit of an own token is known, as it was the best or was drawn here.
        token_ids, known = token_ids[index], self.tokens[index]
        here = (token_ids >= self.start) & (token_ids < self.start + self.n)
        chosen = np.where(here, pack(self.values[index], token_ids), 0)[:, None]
        if (here & (token_ids != known)).any():
            chosen = keys_of(self.raw, index, token_ids, self.start)
        return np.concatenate([chosen.astype(np.uint64), keys], axis=1)

    def report_totals(self, index, top):
        number = len(self.rows) + np.arange(len(index))
        if self.alone:
            return self.settled["total"][self.places[number]].astype(np.int64)
        records = np.zeros(len(index), SETTLED)
        records["job"], records["top"], records["weighs"] = number, top[index], 1
        return self._settle(records)[0]["total"].astype(np.int64)

    # ---- passes over the logits ----

    def _decide(self):
        """Which jobs need a second pass, and what for."""
        R, rows, groups = len(self.rows), self.rows, self.slices * (_THREADS // 32)
        reported = self.reported if self.reported <= _REPORTED else 0
        if self.alone:
            width, ready = max(self.width, min(_DRAWN_FROM, groups // 2)), rows.filtered
        else:
            width, ready = self.width, rows.filtered & (rows.top_k <= self.width)
        self.jobs["wanted"][:R][ready], self.jobs["wanted"][R:] = width, reported

        number = np.concatenate([np.flatnonzero(ready), np.arange(R, len(self.jobs))])
        self.places = np.full(len(self.jobs), -1)
        self.places[number] = np.arange(len(number))
        self.records, of_row = np.zeros(len(number), SETTLED), number < R
        self.records["job"], self.records["draws"] = number, of_row & self.alone
        self.records["wanted"] = np.where(of_row, 0 if self.alone else self.width, reported)
        self.records["weighs"][of_row] = rows.nucleus[ready]
        self.records["weighs"][~of_row] = self.alone
        self.settled = self.keys = None

    def _find(self, tokens, between):
        """The first pass, and the second where it need not wait for other ranks."""
        xp, n_jobs, warps = array.namespace(self.raw), len(self.jobs), _THREADS // 32
        records = self.records if self.alone else self.records[:0]
        board = Board(
            xp, self.jobs, *tokens, np.zeros(n_jobs, FOUND), records, _room_for_keys(records)
        )
        self._jobs, self._found = board[0], board[4]
        self._copies = xp.empty((int(self.jobs["copy"].max()) + 1, self.n), np.float32)
        launch(
            "sample", "scan", (self.slices, n_jobs), _THREADS,
            *(board[i] for i in range(5)), self.raw, self._copies,
            xp.empty((n_jobs, self.slices * max(2, warps)), np.uint64),
            np.int64(self.n), self.n, self.span, self.start,
        )  # fmt: skip
        if self.alone:
            self._launch_settle(board, 5)
        if between is not None:
            between()
        if self.alone:
            self.found, self.settled, self.keys = board.fetch(4)
        else:
            self.found, *_ = board.fetch(4)

    def _settle_below(self, top):
        """The second pass, with the largest logits (R,) of all ranks."""
        if self.settled is None:
            of_row = self.records["job"] < len(self.rows)
            self.records["top"][of_row] = top[self.records["job"][of_row]]
            self.settled, self.keys = self._settle(self.records)

    def _settle(self, records):
        """Records of a second pass, and the keys that it puts out."""
        board = Board(array.namespace(self.raw), records, _room_for_keys(records))
        self._launch_settle(board, 0)
        return board.fetch(0)

    def _launch_settle(self, board, first):
        """Start `settle` on the records and keys that are numbers `first` and next on a board."""
        n_records, width = board.arrays[first + 1].shape
        if not n_records:
            return
        launch(
            "sample", "settle", (self.slices, n_records), _THREADS,
            self._jobs, self._found, board[first], board[first + 1], self.raw, self._copies,
            array.namespace(self.raw).empty((n_records, _ROOM), np.uint64),
            np.int64(self.n), self.n, self.span, self.start, _bits(self.V), _ROOM, width,
            int(self.alone),
        )  # fmt: skip

    def _take_drawn(self):
        """Tokens of the filtered rows; where what was gathered is too little, from all columns."""
        drawn = self.settled["draws"] > 0
        index, done = self.settled["job"][drawn], self.settled["done"][drawn] > 0
        self.tokens[index], self.values[index] = (
            self.settled[name][drawn] for name in ("token", "raw")
        )
        if not done.all():
            self._draw(index[~done], 0, self.settled["total"][drawn][~done])

    def _draw(self, index, floor, total, keys=None):
        """Draw the rows `index` from keys of all ranks, or from all own columns."""
        records = np.zeros(len(index), DRAW)
        records["job"], records["floor"], records["total"] = index, floor, total
        board = Board(array.namespace(self.raw), np.empty(0) if keys is None else keys, records)
        launch(
            "sample", "draw", (len(index),), _ROW_THREADS,
            self._jobs, board[1], None if keys is None else board[0], self.raw, self._copies,
            np.int64(self.n), self.n, self.start, _bits(self.V),
            0 if keys is None else keys.shape[1],
        )  # fmt: skip
        (records,) = board.fetch(1)
        self.tokens[index], self.values[index] = records["token"], records["raw"]
        return records["token"], records["done"] > 0

    def _put_out(self, number, width):
        """Keys of the second pass; of rows that had more than it had room for, from a third."""
        places = self.places[number]
        keys, full = self.keys[places, :width], self.settled["done"][places] == 0
        if full.any():
            keys[full] = self._largest(number[full], width)
        return keys

    def _largest(self, number, width):
        """Keys of the `width` largest logits of the jobs `number`: (len(number), width)."""
        xp = array.namespace(self.raw)
        keys = xp.empty((len(number), width), np.uint64)
        launch(
            "sample", "largest", (len(number),), _ROW_THREADS,
            self._jobs, xp.asarray(number.astype(np.int32)), keys, self.raw, self._copies,
            np.int64(self.n), self.n, self.start, width,
        )  # fmt: skip
        return array.host(keys)


def _room_for_keys(records):
    return np.zeros((len(records), records["wanted"].max(initial=0)), np.uint64)


def _bits(V):
    """Binary digits of the unit of `ops.candidates.weights`."""
    return 62 - V.bit_length()
