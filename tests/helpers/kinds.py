"""Kinds of work and layouts that loops are tried with."""

from mpi4py import MPI

from helpers import layouts

SIZE = MPI.COMM_WORLD.size


def of_every_kind():
    """Layouts with steps under way, replicas, pieces and sides, as far as there are ranks."""
    texts = [f"pp={SIZE}", f"dp={SIZE}", f"dp={SIZE},zero=allgather", f"cp={SIZE},zero=broadcast"]
    texts += [f"afd={M}:{SIZE - M}" for M in {1, SIZE - 1}]
    texts += ["pp=2,tp=2", "pp=2,cp=2", "dp=2,pp=2", "dp=2,pp=2,zero=allgather", "dp=2,afd=2:2"]
    texts += ["cp=2,afd=2:2", "cp=2,pp=2,ep=2,zero=allgather", "dp=2,tp=2,ep=4,sp=on"]
    return [text for text in texts if layouts.is_legal(text, SIZE)]


KINDS = of_every_kind()
