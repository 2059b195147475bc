"""From the path that a Trainer is given to a resumed run: what is loaded, what is set right, and what is said."""
