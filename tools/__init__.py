"""Setting up a checkout: the environment behind `make serve` and `make test`."""
