"""`python -m mtp_lightning`, the same as `mtp`."""

from mtp_lightning.cli.app import main

main()
