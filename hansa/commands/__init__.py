"""One module a command: what it asks of the rooms, and what it prints."""
