"""A checkpoint on its way to the disk, and those that must stay there."""
