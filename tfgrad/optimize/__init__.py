"""Go downhill: every method on one compiled loop, every step recorded."""
