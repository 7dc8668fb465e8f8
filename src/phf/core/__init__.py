"""Types, settings, files, devices, statistics and random numbers: what every other package uses. No torch, nothing else of phf."""
