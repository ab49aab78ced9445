"""`python -m absorber` is the command `absorber`."""

from absorber.cli import main

main()
