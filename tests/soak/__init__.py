"""A hostile campaign against the package: `make soak`. What it promises is in docs/reliability.md."""
