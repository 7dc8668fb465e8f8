"""What every other package uses: types, settings, files, devices, statistics and random numbers.

Imports nothing else of phf. torch is imported inside the functions that need it.
"""
