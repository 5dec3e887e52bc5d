"""The hooks room: the table of sites, what to capture, what to edit, and the one tap that does both."""
