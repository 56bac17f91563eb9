"""`python -m hpcinfer` is the command `hpcinfer`."""

from hpcinfer.cli.main import main

main()
