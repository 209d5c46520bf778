"""Processes, private files, and the runtime folder in which a server and its trainer find each other. No torch."""
