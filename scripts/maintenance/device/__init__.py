"""The parts of `scripts.maintenance.device_report`, one a file."""
