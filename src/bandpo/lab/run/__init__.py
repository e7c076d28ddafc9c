"""One run: its folder, its records, what it says, and its course from the first line to the report."""
