"""A stop at a given moment."""

from hpcinfer.job.stop import Stop


class StopAt(Stop):
    """Stops because of one rank, at one of its rounds."""

    def __init__(self, rank, at):
        super().__init__()
        self._rank, self._left = rank, at

    def tell(self, grid):
        self._left -= 1
        if grid.comm.rank == self._rank and self._left <= 0:
            self.reason = "by the test"
        super().tell(grid)
