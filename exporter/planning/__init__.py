"""What a run would do, from config and headers alone: ``--dry-run``."""
