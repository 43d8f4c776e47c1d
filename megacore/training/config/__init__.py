"""The run file: its sections, how it is read, and every mistake in it."""
