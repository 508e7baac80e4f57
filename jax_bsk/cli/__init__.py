"""Commands of `python -m jax_bsk`: each module of a command has `add_parser(subparsers)` and `run(args)`."""
