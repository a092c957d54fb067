"""The machine that a program runs on: lanes, memories, ordering, asynchronous work, scheduling, hazards and
counters."""
