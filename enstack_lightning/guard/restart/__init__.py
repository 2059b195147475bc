"""What makes a resumed run equal to one that never stopped."""
