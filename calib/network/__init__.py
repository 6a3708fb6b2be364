"""The float network: its checkpoint, its module tree, attention, online rotations, experts."""
