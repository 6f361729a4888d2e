"""Structured pruning: whole channels go, their partners go with them, their readers are re-fitted."""
