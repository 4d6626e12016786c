"""How fast we are, and the peers: who is measured, by which work, and the measuring."""
