"""`python -m services.cli`: the same as `sluice`, for where the script is not installed."""

from services.cli import main

main()
