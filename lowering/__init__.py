"""The Inductor integration."""
