"""`python -m canopyq`."""

from canopyq.cli import main

main()
