"""Earlier runs of `make bench`: reading them, comparing two, and drawing their history."""
