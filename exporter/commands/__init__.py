"""What each command of the front door does, as functions that take values."""
