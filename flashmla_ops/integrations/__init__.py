"""Where other projects' models and engines meet the operators of this library."""
