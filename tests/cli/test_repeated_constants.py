"""What the command line repeats, so that `--help` need not import it, is what it is elsewhere."""

from argparse import ArgumentParser

import pytest

from hpcinfer import array
from hpcinfer.cli import common, extract
from hpcinfer.engine.activations.selection import POINTS
from hpcinfer.ops import dispatch

pytestmark = pytest.mark.single


def test_element_types():
    assert {*common.DTYPES} == array.DTYPES.keys()


def test_points():
    assert extract._POINTS == ", ".join(POINTS)


def test_kernels():
    parser = ArgumentParser()
    common.add_device_options(parser)
    [kernels] = [a for a in parser._actions if a.dest == "kernels"]
    assert tuple(kernels.choices) == dispatch.CHOICES and kernels.default == dispatch.CHOICES[0]
