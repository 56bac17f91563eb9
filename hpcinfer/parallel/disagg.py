"""Attention-FFN disaggregation: attention and FFN on different ranks, in numbers chosen freely.

    before   x (T/A, D) on each of A attention ranks, with each token's k experts and their weights;
             experts cut over the FFN ranks
    after    y (T/A, D) on the attention ranks
    cost     per layer and micro-batch 1 Send from each attention rank to each FFN rank and 1 back
             at most: n (D w + 8 k) bytes sent by an attention rank, w bytes a number; m 4 D bytes
             by an FFN rank. n: pairs of an own token and an FFN rank that has columns of an expert
             it chose; m: pairs of an own expert's token and the attention rank it came from
    source   Zhu et al. 2025, MegaScale-Infer, section 4 (arXiv:2504.02263); Wang et al. 2025,
             Step-3 (arXiv:2507.19427)

Attention reads caches and is bound by memory; the FFN holds most of the weights and is bound by
compute. Apart, each side gets the ranks it needs. The groups meet over an intercommunicator,
whatever the numbers of their ranks are. A side that waits for the other is idle, so a step is
divided in micro-batches: while the FFN side computes one, the attention side works on the next
(ping-pong). Messages between two ranks keep their order, and both sides take layers and
micro-batches in the same one, so messages need no names; how many tokens come is the length of the
message. A dense FFN is one expert that all tokens choose, its columns cut over the FFN ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike

from hpcinfer import array, collectives, partition
from hpcinfer.array import Array
from hpcinfer.partition import ExpertShare
from hpcinfer.transfer import Outgoing

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


class Dispatch:
    """Tokens of one micro-batch under way to their experts and back.

    Parameters
    ----------
    comm : intercommunicator to the FFN ranks
    x : (T/A, D) float32
    ids, weights : (T/A, k) int, float32: experts that each token chose
    shares : list of partition.ExpertShare, the experts and columns of every FFN rank
    dtype : element type in which tokens travel
    common : True if the FFN side has an expert beside these that all tokens choose

    Raises
    ------
    ValueError
        If the shares are not one for each FFN rank, or the choices not one row for each token.
    """

    def __init__(
        self,
        comm: Comm,
        x: Array,
        ids: Array,
        weights: Array,
        shares: list[ExpertShare],
        dtype: DTypeLike = np.float32,
        common: bool = False,
        purpose: str = "disagg",
    ):
        if len(shares) != comm.remote_size or len(ids) != len(x) or weights.shape != ids.shape:
            raise ValueError(
                f"disagg: got {len(shares)} shares, choices {ids.shape} and weights "
                f"{weights.shape} for {len(x)} tokens, need a share for each of "
                f"{comm.remote_size} FFN ranks and a row a token"
            )

        # Send every FFN rank the tokens that chose its experts, with their choices.
        self._comm, self._purpose, self._first = _joined(comm, True), purpose, comm.size
        xp = array.namespace(x)
        self._y = xp.zeros(x.shape, xp.float32)
        self._rows = [
            xp.asarray(r) for r in partition.destinations(array.host(ids), shares, common)
        ]
        records = array.pack_rows(array.narrow(x, dtype), ids.astype(np.int32), weights)
        self._sends = [
            collectives.Isend(self._comm, records[rows], self._first + rank, purpose=purpose)
            for rank, rows in enumerate(self._rows)
        ]

    def collect(self) -> Array:
        """Results of all tokens: (T/A, D) float32, the FFN ranks' added up in their order."""
        y = self._y
        for rank, rows in enumerate(self._rows):
            if len(rows):
                part = array.namespace(y).empty((len(rows), y.shape[1]), np.float32)
                source = self._first + rank
                y[rows] += collectives.Recv(self._comm, part, source, purpose=self._purpose)
        for send in self._sends:
            send.wait()
        return y


def attention_side(
    comm: Comm,
    layers: Iterable[int],
    xs: list,
    attend: Callable,
    add: Callable,
    shares: Callable,
    dtype: DTypeLike = np.float32,
    purpose: str = "disagg",
) -> list:
    """Layers of all micro-batches in ping-pong, on an attention rank.

    Parameters
    ----------
    comm : intercommunicator to the FFN ranks
    layers : numbers of the layers, in order
    xs : list of micro-batches' activations, as `attend` takes them
    attend : function (n, b, x) -> x, sent, ids, weights, common: the attention half of layer n for
        micro-batch b, and the tokens (T/A, D) that go to the FFN side with their choices
    add : function (n, b, x, y) -> x: the FFN's result (T/A, D) taken up
    shares : function of a layer's number, the list of partition.ExpertShare of the FFN ranks

    Returns
    -------
    list of the micro-batches' activations after the last layer
    """
    _joined(comm, True)
    xs, pending, before = list(xs), [None] * len(xs), None
    for n in layers:
        for b, under_way in enumerate(pending):
            # Take up the layer before; while this one is under way, turn to the next micro-batch.
            if under_way is not None:
                xs[b] = add(before, b, xs[b], under_way.collect())
            xs[b], sent, ids, weights, common = attend(n, b, xs[b])
            pending[b] = Dispatch(comm, sent, ids, weights, shares(n), dtype, common, purpose)
        before = n
    for b, under_way in enumerate(pending):
        if under_way is not None:
            xs[b] = add(before, b, xs[b], under_way.collect())
    return xs


def ffn_side(
    comm: Comm,
    layers: Iterable[int],
    micro_batches: int,
    compute: Callable,
    D: int,
    k: Callable[[int], int],
    dtype: DTypeLike = np.float32,
    xp: ModuleType = np,
    purpose: str = "disagg",
) -> None:
    """The same layers and micro-batches on an FFN rank, which serves all attention ranks.

    Parameters
    ----------
    comm : intercommunicator to the attention ranks
    layers : numbers of the layers, in order
    micro_batches : how many
    compute : function (n, x, ids, weights) -> (T, D) float32, a new array: the weighted sum of the
        results of this rank's experts, own columns, for tokens x (T, D) of any attention ranks
    D : model width
    k : function of a layer's number, choices of each token

    Raises
    ------
    ValueError
        If the two sides do not agree on D, k or dtype.
    """
    joined, outgoing = _joined(comm, False), Outgoing()
    for n in layers:
        choices = [np.empty((0, k(n)), kind) for kind in (np.int32, np.float32)]
        like = (np.empty((0, D), dtype), *choices)
        row_bytes = sum(map(array.item_bytes, like))
        for _ in range(micro_batches):
            # Take the tokens of all attention ranks together.
            ranks = range(comm.remote_size)
            messages = [collectives.RecvBytes(joined, rank, purpose=purpose) for rank in ranks]
            if any(len(message) % row_bytes for message in messages):
                raise ValueError(
                    f"disagg: got messages of {[len(m) for m in messages]} bytes in layer {n}, "
                    f"need rows of {row_bytes}; give both sides the same D, k and dtype"
                )
            records = xp.asarray(np.concatenate(messages)).reshape(-1, row_bytes)
            x, ids, weights = array.unpack_rows(records, like)
            y = compute(n, array.widen(x), ids, weights)

            # Answer each attention rank for its own tokens.
            start = 0
            for rank, message in enumerate(messages):
                stop = start + len(message) // row_bytes
                if stop > start:
                    outgoing.add(collectives.Isend(joined, y[start:stop], rank, purpose=purpose))
                start = stop
    outgoing.wait()


def _joined(comm, attends):
    """Both sides in one communicator, attention ranks first; collective when called first.

    MPICH passes messages between ranks of a node through shared memory only within a communicator:
    there the receiver fetches them. Those of an intercommunicator take the way of the network, and
    long ones stand still while their sender computes, so that neither side works while the other
    does.
    """
    joined = comm.Get_attr(_joined_key())
    if joined is None:
        joined = comm.Merge(not attends)
        joined.Set_name(comm.Get_name())
        comm.Set_attr(_joined_key(), joined)
    return joined


@cache
def _joined_key():
    """Key of what is kept with an intercommunicator, and freed with it."""
    from mpi4py import MPI

    return MPI.Comm.Create_keyval(delete_fn=lambda comm, key, joined: joined.Free())
