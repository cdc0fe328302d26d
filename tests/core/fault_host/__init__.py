"""A host for the worker tests: no model, but every kind of trouble."""
