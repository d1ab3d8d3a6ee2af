"""The jobs that workers run: what the client does in each measurement, timed where it happens."""
