"""Lowerings of the library's operators: what Inductor makes of each in our sessions."""
