"""What each stage does, without Prefect: folders and a profile in, files into an empty folder, a small summary out."""
