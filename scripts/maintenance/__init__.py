"""What keeps the project's own pages true: reports that are made anew when the code changes."""
