"""PTX text to a program: types, syntax tree, parser, control-flow graph."""
