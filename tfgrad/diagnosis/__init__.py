"""Why a gradient is missing, zero or not finite: the op, the line, the remedy."""
