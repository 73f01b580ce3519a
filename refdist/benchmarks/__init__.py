"""What is timed, apart from how it is drawn."""
