"""The backends: the table of them, the calls that each serves, and the choice of one for a call."""
