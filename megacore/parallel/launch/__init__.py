"""Starting processes on one or several nodes, and what they report when they fail."""
