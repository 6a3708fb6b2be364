"""A backend of rotq in a package of its own: one ``.npz`` file, readable by numpy alone."""
