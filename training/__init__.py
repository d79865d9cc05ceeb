"""What every run needs and no equation does: flags, run folder, resume, previews, metrics, files."""
