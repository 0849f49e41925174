"""Policy objectives, one a file, each with its equation and source."""
