"""`python -m ckpt_sidecar` is the same as `ckpt-sidecar`."""

from ckpt_sidecar.cli import main

main()
