"""The report: what runs left in their folders, as one page."""
