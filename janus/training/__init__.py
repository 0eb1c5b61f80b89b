"""The force-matching step and the loop around it, for any energy model that is given as a `Task`."""
