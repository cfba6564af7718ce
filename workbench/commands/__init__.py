"""The commands of `workbench`, by subject; `workbench.cli` puts them together.

Each parses, calls one function of the library, and prints. Nothing heavy is imported before a command runs.
"""
