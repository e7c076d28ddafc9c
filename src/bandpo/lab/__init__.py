"""The lab: everything that runs experiments, looks at logs, and writes pages about them."""
