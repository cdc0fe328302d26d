"""What is kept in files: written whole or not at all, and never taken for another's."""
