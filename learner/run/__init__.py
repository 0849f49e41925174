"""A run around its loop: directory, checks before it starts, display, logs, plots, report, interruption."""
