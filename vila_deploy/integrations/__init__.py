"""Models for other people's programs, which find them by entry points."""
