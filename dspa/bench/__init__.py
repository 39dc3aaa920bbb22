"""Measuring on this machine: the operations of the method, checked, then timed in turn with plain torch."""
