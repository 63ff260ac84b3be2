"""From the outside world to validated frames: venue, files, and the sandbox exchange."""
