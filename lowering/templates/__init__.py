"""C++ templates for Inductor, and the way the library's headers get into generated code."""
