"""The app that a deployed federation runs: nothing but the way to the installed Hansa."""
