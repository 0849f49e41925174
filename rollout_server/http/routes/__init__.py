"""What each route does: the public ones, the admin listener's, and the answer that generates."""
