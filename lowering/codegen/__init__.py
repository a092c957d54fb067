"""Inductor's code generation for the CPU, where ours differs: appends inside loops, and the order of steps."""
