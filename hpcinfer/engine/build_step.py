"""What the model is told of a step: the tokens that the scheduler chose, laid end to end."""

from __future__ import annotations

import numpy as np

from hpcinfer import partition
from hpcinfer.engine.block_manager import BlockManager
from hpcinfer.engine.task import Plan
from hpcinfer.model.block_table import BlockTable
from hpcinfer.model.cache import PAGE
from hpcinfer.model.step import Step
from hpcinfer.ops.rope import Rope

# Tokens per rank of cp up to which decoding divides columns: reading weights takes longer than
# computing with them up to about this many.
COLUMNS_TOKENS = 32


def build_step(
    plan: Plan,
    pages: BlockManager,
    kv_rank: int = 0,
    cp: int = 1,
    by_columns: bool = False,
    rope: Rope | None = None,
    tp: int = 1,
) -> Step:
    """Arrays of one step, from the scheduler's plan, whose tokens count as computed afterwards.

    Parameters
    ----------
    plan : list of (Sequence, n), those with one token first; empty for a step that this replica
        takes for the others' sake
    pages : BlockManager
    kv_rank : this rank's pool among those of `pages`
    cp : number of parts in which the tokens are cut; part i computes the tokens of the pools i,
        i + cp, ...
    by_columns : True if steps of few tokens, one of a sequence, divide columns instead of tokens
    rope : Rope or None
    tp : ranks over which sequence parallelism cuts the tokens of a part; 1 without it

    Returns
    -------
    Step; its `wanted` are the last token of every sequence that is then complete, or all tokens of
    a sequence with `wants_all_hidden`
    """
    # Lay the tokens of all sequences end to end.
    counts = np.array([n for _, n in plan], np.int64)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    lengths = np.array([sequence.computed + n for sequence, n in plan], np.int64)
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1] - (lengths - counts), counts)
    owner = np.repeat(np.arange(len(plan)), counts)

    # Find the page of every token, and its place there.
    pool, place = _pages_of(plan, pages)
    token_pool, page_place = (x[owner, positions // PAGE] for x in (pool, place))
    slots = page_place * PAGE + positions % PAGE

    # Say which tokens this rank computes, and which of their keys it stores.
    token_ids, wanted = _computed(plan, bounds)
    columns = by_columns and len(plan) == bounds[-1] <= COLUMNS_TOKENS * cp
    part = token_pool % cp
    mine = np.arange(bounds[-1]) if columns else np.flatnonzero(part == kv_rank % cp)
    stored = np.flatnonzero(token_pool[mine] == kv_rank)
    first_pool = pool[:, 0] if plan else lengths
    return Step(
        token_ids=np.array(token_ids, np.int32),
        tokens=np.stack([owner, positions], axis=1).astype(np.int32),
        lengths=lengths,
        numbers=np.array([sequence.number for sequence, _ in plan], np.int64),
        complete=np.array([sequence.computed == sequence.target for sequence, _ in plan], bool),
        n_single=int(np.sum(counts == 1)),
        wanted=np.array(wanted, np.int64),
        length_classes=_length_classes(plan, owner, positions, rope),
        columns=columns,
        parts=cp,
        part=part,
        home=np.full_like(part, -1) if columns else _homes(part, cp, tp),
        mine=mine,
        stored=stored,
        slot_mapping=slots[mine[stored]],
        block_table=BlockTable(place, first_pool, kv_rank, pages.ranks, lengths),
    )


def _pages_of(plan: Plan, pages: BlockManager) -> tuple[np.ndarray, np.ndarray]:
    """Pool of every page of the sequences, and its place there: (B, pages), filled with page 0."""
    table = np.zeros((len(plan), max((len(s.pages) for s, _ in plan), default=0)), np.int64)
    for b, (sequence, _) in enumerate(plan):
        table[b, : len(sequence.pages)] = sequence.pages
    return np.divmod(table, pages.n)


def _computed(plan: Plan, bounds: np.ndarray) -> tuple[list[int], list[int]]:
    """Tokens of a step, and whose hidden states are wanted; they count as computed from now on."""
    token_ids: list[int] = []
    wanted: list[int] = []
    for b, (sequence, n) in enumerate(plan):
        end = sequence.computed + n
        token_ids += sequence.tokens[sequence.computed : end]
        if sequence.wants_all_hidden:
            known = min(max(sequence.n_known - sequence.computed, 0), n)
            wanted += range(bounds[b] + known, bounds[b + 1])
        elif end == sequence.target:
            wanted.append(bounds[b + 1] - 1)
        sequence.computed = end
    return token_ids, wanted


def _homes(part: np.ndarray, cp: int, tp: int) -> np.ndarray:
    """Rank of tp that keeps each token between the halves of a layer; -1 if all do."""
    home = np.full_like(part, -1)
    for p in range(cp):
        tokens = np.flatnonzero(part == p)

        # With fewer tokens than ranks it costs less to let every rank keep them all.
        if tp > 1 and len(tokens) >= tp:
            for rank, (start, stop) in enumerate(partition.block(len(tokens), tp)):
                home[tokens[start:stop]] = rank
    return home


def _length_classes(
    plan: Plan, owner: np.ndarray, positions: np.ndarray, rope: Rope | None
) -> np.ndarray | None:
    """Class of the text's length for every token: the prompt's, then its own position + 1."""
    if rope is None or not rope.depends_on_length:
        return None
    prompts = np.array([sequence.n_prompt for sequence, _ in plan])
    lengths = np.maximum(prompts[owner], positions + 1)
    classes, which = np.unique(lengths, return_inverse=True)
    return np.array([rope.length_class(int(n)) for n in classes])[which]
