"""The sending side of weight sync, one transport a file."""
