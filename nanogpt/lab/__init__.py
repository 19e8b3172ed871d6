"""Many runs: the commands, searches, processes."""
