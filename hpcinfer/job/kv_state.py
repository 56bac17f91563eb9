"""Keys and values in the state of a run: kept beside it, and taken up by the next start.

Every rank keeps the pages of its pool that sequences hold, for its own layers and heads, so they
serve ranks that own the same: a start in the same layout. The state says which pages hold which
tokens. Tokens of a sequence only ever grow in number, so pages of an older snapshot are still those
of its beginning; a checksum of the tokens makes sure of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer import array
from hpcinfer.engine.block_manager import pages_for
from hpcinfer.errors import one_line
from hpcinfer.grid import agree, agree_all
from hpcinfer.io.kv import (
    BLOCK_BYTES,
    kv_file,
    next_kv_generation,
    read_blocks,
    read_facts,
    remove_kv_file,
    write_kv,
)
from hpcinfer.job.progress import say
from hpcinfer.job.state import RunState
from hpcinfer.model.cache import PAGE

if TYPE_CHECKING:
    from hpcinfer.engine.api import Engine
    from hpcinfer.engine.sequence import Sequence
    from hpcinfer.model.cache import Cache

# Seconds that writing may take; a run that is to stop has few.
_PATIENCE_S = 3.0


class KvState:
    """What one rank keeps of its cache; every rank makes one, when the outputs are open.

    Parameters
    ----------
    engine : Engine
    state : RunState, open and begun on the root

    Attributes
    ----------
    sequences : dict of index -> (replica, for every sample [tokens, their checksum, pages] or
        None), what this start can take up; equal on every rank
    """

    def __init__(self, engine: Engine, state: RunState):
        self._engine, self._path = engine, state.outputs[0]
        self._pages = engine.scheduler.pages

        # Hear what the state says, and give it up where some rank cannot use what it has of it.
        comm = engine.grid.comm
        saved, self._generation = agree(comm, lambda: (state.kv, next_kv_generation(self._path)))
        self._saved = {int(replica): facts for replica, facts in saved.items()}
        try:
            self._refuse_other_cut()
            agree_all(comm, self._check_file)
        except ValueError as error:
            self._saved = {}
            if engine.grid.is_root:
                say(f"{one_line(error)}; prompts are computed again")
        if engine.grid.is_root:
            state.begin_kv(self._saved, self._generation)
        self.sequences = {
            int(index): (replica, samples)
            for replica, facts in self._saved.items()
            for index, samples in facts["sequences"].items()
        }

    def save(self) -> dict | None:
        """Write this rank's part of what the running sequences hold.

        Collective over the replica, between rounds, when every rank has computed the same ones.

        Returns
        -------
        dict for `RunState.take`; None if nothing was kept
        """
        grid, model = self._engine.grid, self._engine.model
        sequences = _sequences(self._engine.scheduler.running)
        if not sequences:
            return None

        # Of the pages that sequences hold, take those in this rank's pool.
        held = {page for samples in sequences.values() for s in samples if s for page in s[2]}
        pool = model.attention.kv.rank
        own = sorted(page for page in held if self._pages.owner(page) == pool)
        generation, self._generation = self._generation, self._generation + 1
        path = kv_file(self._path, grid.dp.rank, generation, grid.comm.rank)

        # Keep all files of a generation, or none.
        try:
            agree_all(grid.replica, self._write, path, generation, own)
        except RuntimeError as error:
            remove_kv_file(path)
            if grid.replica.rank == 0:
                say(f"{one_line(error)}; the state goes without these keys and values")
            return None
        return {
            "generation": generation,
            "layout": str(grid.layout),
            "pages": self._pages.n,
            "sequences": sequences,
        }

    def _write(self, path: str, generation: int, own: list[int]) -> None:
        """Write this rank's pages, which are numbered `own`, to its file."""
        facts = self._facts(generation) | {"pages": own}
        slices = list(_slices(self._engine.model.cache, len(own)))
        places = np.array(own, np.int64) % self._pages.n
        sizes = [array.item_bytes(x) * (stop - start) for x, start, stop in slices]
        blocks = (_bytes(x, places[start:stop]) for x, start, stop in slices)
        write_kv(path, facts, sizes, blocks, _PATIENCE_S)

    def resume(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences of this replica: those whose pages are kept run, as far as they fit.

        The same on every rank of the replica, without a message.

        Parameters
        ----------
        sequences : those whose request is among `self.sequences`
        """
        scheduler, new_of = self._engine.scheduler, {}
        for sequence in sequences:
            _, samples = self.sequences[sequence.request.index]
            kept = samples[sequence.sample]
            usable = kept is not None and _belongs(kept, sequence)
            if not (usable and self._run(*kept, sequence, new_of)):
                scheduler.add(sequence)
        if new_of:
            self._copy(new_of)

    def _run(
        self, computed: int, _: int, old: list[int], sequence: Sequence, new_of: dict[int, int]
    ) -> bool:
        """Run a sequence with new pages for its old ones; False if it does not fit.

        Parameters
        ----------
        new_of : dict of old page -> new page of what was taken up, which grows
        """
        scheduler, pages = self._engine.scheduler, self._pages

        # Leave a sequence to the queue whose pages do not fit.
        n = self._saved[self.sequences[sequence.request.index][0]]["pages"]
        owners = [page // n for page in old if page not in new_of]
        if len(scheduler.running) == scheduler.limits.sequences or not pages.can_allocate(owners):
            return False

        # Share the pages that others brought along, and take new ones for the rest.
        pages.acquire([new_of[page] for page in old if page in new_of])
        lacking = [page for page in old if page not in new_of]
        new_of |= dict(zip(lacking, pages.allocate(owners), strict=True))
        scheduler.resume(sequence, computed, [new_of[page] for page in old])
        return True

    def _copy(self, new_of: dict[int, int]) -> None:
        """Copy this rank's pages from its file to where they are now."""
        cache, path = self._engine.model.cache, self._file()
        own = read_facts(path)[0]["pages"]
        blocks = zip(_slices(cache, len(own)), read_blocks(path), strict=True)
        for (x, start, stop), block in blocks:
            rows = [i for i, page in enumerate(own[start:stop]) if page in new_of]
            places = [new_of[own[start + i]] % self._pages.n for i in rows]
            content = np.frombuffer(block, x.dtype).reshape(stop - start, *x.shape[1:])
            xp = array.namespace(x)
            x[xp.asarray(np.array(places, np.int64))] = xp.asarray(content[rows])

    def _refuse_other_cut(self) -> None:
        """Refuse what is kept of another cut of the cache, as far as the state says."""
        layout = str(self._engine.grid.layout)
        for facts in self._saved.values():
            if facts["layout"] != layout:
                raise ValueError(f"kv: saved under layout {facts['layout']}, this run has {layout}")

    def _check_file(self) -> None:
        """Refuse this rank's file, if it should have one, unless it is whole and fits this run."""
        replica = self._engine.grid.dp.rank
        if self._engine.grid.role == "ffn" or replica not in self._saved:
            return

        # Compare what must be equal.
        expected = self._facts(self._saved[replica]["generation"])
        facts, _, _ = read_facts(self._file())
        other = [word for word, value in expected.items() if facts.get(word) != value]
        if other:
            got, need = (", ".join(f"{w} {f.get(w)}" for w in other) for f in (facts, expected))
            raise ValueError(f"kv: got {got}, need {need}")

        # Read all of it, for its checksums.
        for _ in read_blocks(self._file()):
            pass

    def _file(self) -> str:
        """Name of the file that an earlier start has left for this rank."""
        grid = self._engine.grid
        generation = self._saved[grid.dp.rank]["generation"]
        return kv_file(self._path, grid.dp.rank, generation, grid.comm.rank)

    def _facts(self, generation: int) -> dict:
        """What must be equal where pages are written and where they are taken up."""
        grid, model = self._engine.grid, self._engine.model
        return {
            "layout": str(grid.layout),
            "ranks": grid.comm.size,
            "rank": grid.comm.rank,
            "generation": generation,
            "model": self._engine.checksum,
            "dtype": str(model.dtype),
            "page": PAGE,
            "arrays": {name: list(x.shape[1:]) for name, x in model.cache.arrays()},
        }


def _sequences(running: Iterable[Sequence]) -> dict:
    """What is in the cache of running sequences, by request and sample.

    The last token before the next one is computed again by whoever goes on: its hidden state is not
    kept.
    """
    found = {}
    for sequence in running:
        last = len(sequence.logprobs) if sequence.wants_all_hidden else sequence.target - 1
        computed = min(sequence.computed, last)
        if computed < 1:
            continue
        samples = len(sequence.siblings) or 1
        kept = found.setdefault(sequence.request.index, [None] * samples)
        pages = sequence.pages[: pages_for(computed)]
        kept[sequence.sample] = [computed, _checksum(sequence.tokens[:computed]), pages]
    return found


def _belongs(kept: list, sequence: Sequence) -> bool:
    """True if what is kept is of this sequence, and something of it is left to compute."""
    computed, checksum, _ = kept
    last = sequence.n_known if sequence.wants_all_hidden else sequence.target - 1
    return computed <= min(last, sequence.target - 1) and checksum == _checksum(
        sequence.tokens[:computed]
    )


def _checksum(tokens: list[int]) -> int:
    return zlib.crc32(np.array(tokens, np.int32).tobytes())


def _slices(cache: Cache, n: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """(array, start, stop) of every block in which n pages are written."""
    for _, x in cache.arrays():
        step = max(1, BLOCK_BYTES // array.item_bytes(x))
        for start in range(0, n, step):
            yield x, start, min(start + step, n)


def _bytes(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Pages of an array in host memory: (bytes,) uint8."""
    pages = array.host(x[array.namespace(x).asarray(places)])
    return np.ascontiguousarray(pages).reshape(-1).view(np.uint8)
