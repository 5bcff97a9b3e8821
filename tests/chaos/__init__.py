"""Proofs by disturbance: processes killed at moments that nobody chose, over a store that fails."""
