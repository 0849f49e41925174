"""From rewards to the advantage of every token, one form of credit a file."""
