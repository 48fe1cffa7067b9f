"""Moving points and values between processes: coordinator, workers, MPI, devices, signals.

Knows neither what a loss is nor what a file looks like. Import from the modules; only `ranks` ever imports MPI, and
only where a launcher started the process.
"""
