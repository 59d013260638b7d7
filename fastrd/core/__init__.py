"""Tools that all other parts use; imports nothing else of the package."""
