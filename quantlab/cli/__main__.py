"""`python -m quantlab.cli`, for a checkout that is not installed."""

from quantlab.cli import main

main()
